import logging
import signal

import pytest

from bptools.finetune import InputError, RateFound, Stopped, exit_status, load_config, make_folder, restarted


def raising(error):
    def job():
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("--lr: expected more"), 2, "error: --lr: expected more\n"),
        (FloatingPointError("gradient norm is nan\nand more"), 2, "error: gradient norm is nan\n"),
        (ConnectionError("another process is gone"), 2, "error: another process is gone\n"),
        (RuntimeError("DataLoader worker (pid 1) is killed"), 2, "error: DataLoader worker (pid 1) is killed\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_known_errors_are_one_line(capsys, error, status, words):
    assert exit_status(raising(error)) == status
    assert capsys.readouterr().err == words


def test_a_package_that_peft_imports_warns_of_no_kernel(caplog):
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert exit_status(lambda: said.warning("no kernel") or said.error("no library") or 0) == 0
    assert [record.message for record in caplog.records] == ["no library"]


def test_what_stopped_says_how_to_go_on(tmp_path, capsys):
    make_folder(tmp_path / "job", {})
    stop = Stopped(15, tmp_path / "job" / "seed0" / "full")
    assert exit_status(raising(stop)) == 128 + 15
    assert capsys.readouterr().out.endswith(f"--resume {tmp_path / 'job'}\n")


def test_of_several_processes_one_says_how_all_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, words in ((1, ""), (0, "saved; continue: uv run torchrun --nproc-per-node 2 ")):
        monkeypatch.setenv("RANK", str(rank))
        assert exit_status(raising(Stopped(signal.SIGINT, tmp_path))) == 130
        out = capsys.readouterr().out
        assert out.startswith(words)
        assert bool(out) == bool(words)


def test_settings_come_back_as_they_were(tmp_path):
    make_folder(tmp_path / "job", {"lr": 0.1, "phases": ("head:1", "all:2"), "data": None})
    assert load_config(tmp_path / "job") == {"lr": 0.1, "phases": ("head:1", "all:2"), "data": None}
    (tmp_path / "job" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"^--resume .*job: .*config.json is torn or not JSON"):
        load_config(tmp_path / "job")


def test_other_ends(tmp_path):
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 1) == 1
    assert exit_status(raising(RateFound(type("F", (), {"suggestion": 0.1}), tmp_path))) == 0
    for bug in (ZeroDivisionError(), RuntimeError("a bug")):
        with pytest.raises(type(bug)):
            exit_status(raising(bug))


def test_a_job_is_known_again_after_torchrun_has_started_it_anew(tmp_path, monkeypatch):
    make_folder(tmp_path / "job", {})
    assert not restarted(tmp_path / "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(tmp_path / "job")
    assert not restarted(tmp_path / "other")
