"""The folder that a compile writes into: nothing of the user's is touched, one writer at a time."""

import threading

import pytest

from qcc.compiler.output_folder import BUILDING, locked, staging
from qcc.runtime.errors import QccError


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    """`-o .` in a project must not cost its lib/."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine.py").write_text("x")
    (tmp_path / "params_shard_0.bin").write_text("x")
    with pytest.raises(QccError, match="has files and is no artifact of qcc"), staging(tmp_path):
        pass
    assert (tmp_path / "lib" / "mine.py").read_text() == "x"
    assert (tmp_path / "params_shard_0.bin").read_text() == "x"


def test_what_an_interrupted_compile_left_is_ours(tmp_path):
    """Files without a qcc.json may be written over where .building tells whose they are."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), staging(out):
        (out / "params_shard_0.bin").write_text("half")
        raise RuntimeError
    assert [path.name for path in (out / BUILDING).iterdir()] == []
    with staging(out) as work:
        assert work.is_dir()


def test_a_failure_before_anything_was_written_leaves_no_folder(tmp_path):
    """A wrong flag makes no empty folder."""
    with pytest.raises(RuntimeError), staging(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()


def test_the_second_writer_waits_and_says_so(tmp_path):
    """Two compiles of one folder run one after the other."""
    order, notices = [], []
    inside, go = threading.Event(), threading.Event()

    def second():
        with locked(tmp_path / "out", notices.append):
            order.append("second")

    def first():
        with locked(tmp_path / "out", notices.append):
            inside.set()
            go.wait(10)
            order.append("first")

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    assert inside.wait(10)
    two.start()
    two.join(0.3)
    assert order == []
    go.set()
    one.join(10)
    two.join(10)
    assert order == ["first", "second"]
    assert notices == [f"Waiting for another qcc that writes {tmp_path / 'out'}"]
