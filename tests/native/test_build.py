"""Building the kernels: once for all runs, and one clear line where it cannot be done."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from mulligan.errors import UserError
from mulligan.models.kernels import check_kernels
from mulligan.native import build
from tests.helpers import needs_compiler, tiny
from tests.sampling.helpers import build as build_model


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with nothing kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path / "cache" / "mulligan"
    build.library.cache_clear()


@needs_compiler
def test_it_is_built_once(fresh, monkeypatch):
    assert build.library().attend_float32
    kept = list(fresh.iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".so"
    build.library.cache_clear()
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: ran.append(command) or run(command, **more))
    assert build.library().attend_float32
    assert [command[1:] for command in ran] == [["--version"]]


@needs_compiler
def test_other_flags_are_another_build(fresh, monkeypatch):
    build.library()
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O1"))
    build.library.cache_clear()
    build.library()
    assert len(list(fresh.iterdir())) == 2


def refused(match):
    build.library.cache_clear()
    with pytest.raises(UserError, match=match):
        build.library()


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refused(r"^model\.kernels: there is no C\+\+ compiler \(c\+\+, g\+\+ or clang\+\+, or CXX\)$")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    refused(r"^model\.kernels: /no/such/compiler: No such file or directory$")


def test_a_compiler_that_fails(fresh, tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "decode.cpp:1: error: no" >&2; exit 1; }\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    refused(r"^model\.kernels: .*c\+\+ fails: decode.cpp:1: error: no$")
    assert list(fresh.iterdir()) == []  # nothing half done


def test_nowhere_to_keep_it(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        refused(r"^model\.kernels: .*/cache/mulligan/kernels-\w+\.so: ")
    finally:
        build.library.cache_clear()


def test_models_that_they_are_not_for():
    with pytest.raises(UserError, match=r"^model\.kernels: the layers of gemma2 \(Gemma2DecoderLayer\) are not"):
        check_kernels(build_model(Gemma2ForCausalLM, Gemma2Config, head_dim=8))
    with pytest.raises(UserError, match=r"^model\.kernels: for float32 or bfloat16 on a CPU.* is float64 on cpu$"):
        check_kernels(tiny("looped"))
    half = tiny("looped", torch.float32)
    half.lm_head.bfloat16()
    with pytest.raises(UserError, match=r"is bfloat16, float32 on cpu$"):
        check_kernels(half)
