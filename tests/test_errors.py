import pytest

from momentum_tuner.errors import InputError, MomentumTunerError, describe_failure, describe_traceback, redact


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://anna:hunter2@host/d",
        "postgresql+psycopg://anna:hun@ter2@host:5432/d?x=1",
        "http://anna:hun/ter2@host",
        "postgresql://host/d?user=anna&password=hunter2&x=1",
        "could not reach 'https://anna:hunter2@host/path' (password=hunter2)",
        "token=hunter2; TOKEN=hunter2",
    ],
)
def test_secrets_of_urls_are_hidden(text):
    shown = redact(text)
    assert "hun" not in shown
    assert "ter2" not in shown
    assert "***" in shown


@pytest.mark.parametrize("text", ["sqlite:///a/b.db", "http://host:5000/path", "mail anna@host", "loss = 0.5"])
def test_what_holds_no_secret_stays(text):
    assert redact(text) == text


def test_a_failure_is_one_line_with_its_place_and_no_secret():
    try:
        raise ValueError("no answer from http://anna:hunter2@host\nmore")
    except ValueError as error:
        line = describe_failure(error)
    assert line.startswith("ValueError: no answer from http://***@host (test_errors.py:")
    assert "\n" not in line


def test_a_traceback_has_every_frame_and_neither_a_secret_nor_a_line_of_source():
    def connect(password):
        raise ValueError(f"no answer from http://anna:{password}@host")

    try:
        connect("hunter2")
    except ValueError as error:
        *frames, said = describe_traceback(error).splitlines()
    assert [frame.rpartition(" in ")[2] for frame in frames] == [
        "test_a_traceback_has_every_frame_and_neither_a_secret_nor_a_line_of_source",
        "connect",
    ]
    assert said == "ValueError: no answer from http://***@host"
    assert "hunter2" not in "".join(frames)


def test_a_long_traceback_keeps_its_deepest_frames_whole():
    def fall(depth):
        if depth == 0:
            raise ValueError("the bottom")
        fall(depth - 1)

    try:
        fall(200)
    except ValueError as error:
        text = describe_traceback(error)
    *frames, said = text.splitlines()
    assert said == "ValueError: the bottom"
    assert 3800 < len(text) <= 4000
    assert len(frames) > 10
    assert all(frame.startswith('File "') and frame.endswith(" in fall") for frame in frames)


def test_bad_input_exits_with_2_and_failed_work_with_1():
    assert InputError.exit_code == 2
    assert MomentumTunerError.exit_code == 1
