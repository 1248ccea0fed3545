"""The limits of tests themselves: one that waits fails in time, and says where it and its processes waited."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WAITING = """
import os, threading, time, pytest
import forks

@pytest.mark.limit(1)
def test_that_waits_for_a_thread():
    threading.Event().wait()

@pytest.mark.limit(1)
def test_that_waits_for_a_fork():
    if not os.fork():
        def child_waits(): time.sleep(6)
        child_waits()
        os._exit(0)
    os.wait()

@pytest.fixture
def slow_fixture():
    time.sleep(60)

@pytest.mark.limit(1)
def test_whose_fixture_waits(slow_fixture): pass

def test_after_them(): pass
"""

COMPILING = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch._inductor.config
import torch._inductor.async_compile as async_compile

def test_fork_compiles_by_itself():
    torch._inductor.config.compile_threads = 2
    submit = async_compile.AsyncCompile.submit
    assert submit(os.getpid).result() == os.getpid(), "the pool of the parent has threads now"
    child = os.fork()
    if not child:
        os._exit(0 if submit(os.getpid) == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def run_tests(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text('import forks\npytest_plugins = ["limits"]\nforks.register()\n')
    (folder / "test_it.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini")]
    return subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=200, cwd=Path(__file__).parent, check=False
    )


def test_waiting_test_fails_at_its_limit_and_says_what_it_waited_for(tmp_path: Path) -> None:
    out = run_tests(tmp_path, WAITING).stdout
    assert "3 failed, 1 passed" in out or ("2 failed" in out and "1 error" in out and "1 passed" in out), out
    assert out.count("the call did not end within 1 s") >= 2 and "the set-up did not end within 1 s" in out
    assert "threading.Event().wait()" in out and "child_waits" in out.partition("Captured stderr")[2]


def test_forked_process_compiles_without_its_parents_threads(tmp_path: Path) -> None:
    done = run_tests(tmp_path, COMPILING)
    assert done.returncode == 0, done.stdout
