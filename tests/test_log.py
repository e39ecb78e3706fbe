import errno
import os

import pytest

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


# --- loggers --------------------------------------------------------------------------------------------


class Told:
    """A logger that writes down how it is called, and fails when it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.said: list[tuple] = []

    def _say(self, name: str, *args: object) -> None:
        if name in self.failing.split():
            raise ConnectionError(f"no {name} today\nand more")
        self.said.append((name, *args))

    def start(self, run, directory, kept):
        self._say("start", dict(run), directory.name, None if kept is None else [record["step"] for record in kept])

    def metrics(self, record):
        self._say("metrics", record["step"])

    def flush(self):
        self._say("flush")

    def close(self, failed):
        self._say("close", failed)


def test_loggers_are_told_what_the_file_has_and_where_a_resumed_run_begins(tmp_path):
    first, second, third = Told(), Told(), Told()
    with RunLog(tmp_path / "run", loggers={"a": first}, run={"seed": 3}) as log:
        log.metrics({"step": 0})
        log.metrics({"step": 4})
        offsets = log.flush()
        log.metrics({"step": 5})
        log.confirm()
    with pytest.raises(KeyError), RunLog(tmp_path / "run", offsets=offsets, loggers={"a": second}):
        raise KeyError
    with RunLog(tmp_path / "run", offsets=NEW, loggers={"a": third}) as log:
        log.close()
    began = ("start", {"seed": 3}, "run", None)
    assert first.said == [began, ("metrics", 0), ("metrics", 4), ("flush",), ("metrics", 5), ("close", False)]
    assert second.said == [("start", {}, "run", [0, 4]), ("close", True)]  # step 5 comes again
    assert third.said == [("start", {}, "run", []), ("close", False)]


def test_a_logger_that_cannot_start_stops_the_run_before_anything_is_cut(tmp_path):
    with RunLog(tmp_path) as log:
        log.metrics({"step": 1})
    good = Told()
    with pytest.raises(UserError, match=r"^log\.to: bad cannot start: ConnectionError: no start today$"):
        RunLog(tmp_path, offsets=NEW, loggers={"good": good, "bad": Told("start")})
    assert good.said[-1] == ("close", True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_what_a_logger_did_not_take_is_offered_again_in_order(tmp_path):
    told = Told("metrics")
    with RunLog(tmp_path, loggers={"mine": told}) as log:
        log.metrics({"step": 1})
        log.metrics({"step": 2})
        told.failing = ""
        log.metrics({"step": 3})
        log.flush()
        log.confirm()
    assert [step for _, step in told.said[1:4]] == [1, 2, 3]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_logger_that_stays_broken_stops_the_run_behind_a_checkpoint_and_not_before(tmp_path):
    told, other = Told("metrics"), Told()
    with pytest.raises(UserError) as caught, RunLog(tmp_path, loggers={"mine": told, "other": other}) as log:
        log.metrics({"step": 1})
        log.metrics({"step": 2})
        log.flush()
        log.confirm()
    assert str(caught.value) == (
        "log.to: mine fails (ConnectionError: no metrics today; 2 records waiting): this step is saved and "
        "metrics.jsonl has all numbers; --resume goes on, with another log.to if need be"
    )
    assert [say[0] for say in other.said] == ["start", "metrics", "metrics", "flush", "close"]
    told = Told("flush")
    with RunLog(tmp_path / "flush", loggers={"mine": told}) as log:
        log.flush()
        with pytest.raises(UserError, match=r"mine fails \(ConnectionError: no flush today; 0 records waiting\)"):
            log.confirm()
        told.failing = ""
        log.flush()
        log.confirm()


def test_an_end_that_fails_is_told_unless_an_error_is_on_its_way(tmp_path):
    with (
        pytest.raises(UserError, match=r"mine fails at the end \(ConnectionError: no close today\)"),
        RunLog(tmp_path, loggers={"mine": Told("close")}),
    ):
        pass
    with pytest.raises(KeyError), RunLog(tmp_path / "b", loggers={"mine": Told("close")}):
        raise KeyError
