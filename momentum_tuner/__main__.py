"""`python -m momentum_tuner` is `momentum-tuner`."""

from momentum_tuner.cli import main

if __name__ == "__main__":
    main()
