import errno
import json
import os
import sys
from pathlib import Path

import pytest

from mulligan import log as log_module
from mulligan.errors import UserError
from mulligan.log import RunLog, read_metrics

NEW = {"metrics.jsonl": 0, "samples.jsonl": 0}


def write(log: RunLog, steps: range) -> None:
    for step in steps:
        log.metrics({"step": step, "reward": 0.1 * step, "a": 1e-17})
        log.samples([{"step": step, "text": "é\n", "passed": True}, {"step": step, "tokens": (1, 2)}])


def test_lines_have_the_given_order_and_every_digit(tmp_path):
    with RunLog(tmp_path / "new" / "run") as log:
        log.metrics({"step": 3, "z": 0.1 + 0.2, "a": 1})
        assert (tmp_path / "new" / "run" / "metrics.jsonl").read_text() == (
            '{"step": 3, "z": 0.30000000000000004, "a": 1}\n'  # seen at once, without a flush
        )


def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    with RunLog(tmp_path / "whole") as log:
        write(log, range(6))
    with RunLog(tmp_path / "cut") as log:
        write(log, range(3))
        offsets = log.flush()
        write(log, range(3, 5))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a kill in mid line
    with RunLog(tmp_path / "cut", offsets=offsets) as log:
        write(log, range(3, 6))
        ends = log.flush()
    for name in NEW:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert ends[name] == (tmp_path / "cut" / name).stat().st_size


def test_a_directory_of_another_run_is_refused(tmp_path):
    with RunLog(tmp_path) as log:
        pass
    with RunLog(tmp_path) as log:  # empty files are nobody's
        log.samples([{"a": 1}])
    with pytest.raises(UserError, match=r"samples\.jsonl has records of another run"):
        RunLog(tmp_path)


def test_a_file_shorter_than_its_offset_changes_nothing(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, range(2))
        offsets = log.flush()
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=rf"samples\.jsonl has 0 bytes, but had {offsets['samples.jsonl']} when"):
        RunLog(tmp_path, offsets={**offsets, "metrics.jsonl": 0})
    assert (tmp_path / "metrics.jsonl").stat().st_size == offsets["metrics.jsonl"]
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"samples\.jsonl has 0 bytes"):
        RunLog(tmp_path, offsets=offsets)
    with pytest.raises(UserError, match="offsets name"):
        RunLog(tmp_path, offsets={"metrics.jsonl": 0})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": float("nan")}, r"metrics\.jsonl: loss is nan"),
        ({"a": {"b": [0.0, -float("inf")]}}, r"a\.b\[1\] is -inf"),
        ({"a": {1}}, "a is a set"),
        ({3: 1}, "the key 3"),
    ],
)
def test_what_is_not_finite_or_not_json_is_refused_by_name(tmp_path, record, message):
    with RunLog(tmp_path) as log:
        with pytest.raises(UserError, match=message):
            log.metrics({"step": 1, **record})
        with pytest.raises(UserError):
            log.samples([{"fine": 1}, record])
        assert log.flush() == NEW


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path, monkeypatch):
    with RunLog(tmp_path) as log:
        write(log, range(1))
        before = log.flush()
        lines = log._lines["metrics.jsonl"]
        real = lines._file

        class Full:
            def write(self, data: memoryview) -> int:
                if len(data) < 20:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real.write(data[:7])  # a short write first, as disks do

            def __getattr__(self, name: str):
                return getattr(real, name)

        lines._file = Full()
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space left on device"):
            log.metrics({"step": 1, "reward": 0.123456789})
        assert log.flush() == before
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
        lines._file = real

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write: No space left on device"):
            log.flush()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot make this directory"):
        RunLog(tmp_path / "file")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").rmdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "absent" / "file")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot open"):
        RunLog(tmp_path / "run")


def test_reading_passes_over_a_half_line_but_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(path)
    path.write_text("7\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_metrics(path)
    with pytest.raises(UserError, match="cannot read: No such file"):
        read_metrics(tmp_path / "absent")


# --- TensorBoard ----------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'mulligan\[tensorboard\]'"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


class FakeBoard:
    """What the log says to TensorBoard."""

    said: list = []  # noqa: RUF012 - emptied by the test

    def __init__(self, directory: str, purge_step: int | None) -> None:
        self.said.append((Path(directory).name, purge_step))

    def add_scalar(self, *args: object) -> None:
        self.said.append(args)

    def flush(self) -> None:
        pass

    close = flush


def test_tensorboard_gets_the_numbers_and_forgets_the_steps_that_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "_summary_writer", lambda: FakeBoard)
    FakeBoard.said.clear()
    with RunLog(tmp_path, tensorboard=True) as log:
        log.metrics({"step": 0, "reward": 0.5, "method": "grpo"})
        offsets = log.flush()
        log.metrics({"step": 1, "reward": 0.25})
    with RunLog(tmp_path, offsets=offsets, tensorboard=True):
        pass
    with RunLog(tmp_path / "other", offsets=NEW, tensorboard=True):
        pass
    assert FakeBoard.said == [
        ("tensorboard", None),
        ("reward", 0.5, 0),
        ("reward", 0.25, 1),
        ("tensorboard", 1),
        ("tensorboard", 0),
    ]
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0]
