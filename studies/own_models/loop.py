"""A loop of one's own: an agent that sees a digit, names it, and only hears whether that was right (REINFORCE)."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from momentum_tuner import Loop


def build(hidden: int = 32, steps: int = 50) -> Loop:
    data = load_digits()
    images, digits = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    unseen, answers = images[1400:], digits[1400:]

    def train(context):
        policy = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(context.device)
        optimizer = context.optimizer(policy.parameters(), steps_per_epoch=steps)
        expected = 0.1  # reward, a running mean
        if state := context.load():
            policy.load_state_dict(state["policy"])
            optimizer.load_state_dict(state["optimizer"])
            expected = state["expected"]

        def measures(**others):
            with torch.no_grad():
                chances = policy(unseen.to(context.device)).softmax(-1).cpu()
            reward = chances.gather(1, answers[:, None]).mean()
            return {"valid_loss": 1 - reward, "valid_reward": reward, **others}

        yield measures()
        for _ in range(context.epoch, context.epochs):
            losses = []
            for _ in range(steps):
                rows = torch.randint(0, 1400, (int(context.settings["batch_size"]),))
                choice = torch.distributions.Categorical(logits=policy(images[rows].to(context.device)))
                actions = choice.sample()
                rewards = (actions.cpu() == digits[rows]).float().to(context.device)
                loss = -(choice.log_prob(actions) * (rewards - expected)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                expected = 0.99 * expected + 0.01 * rewards.mean().item()
                losses.append(loss.item())
            context.save({"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "expected": expected})
            yield measures(train_loss=sum(losses) / steps)

    return Loop(train=train, metrics=["reward"])
