"""Surroundings of a program: no home folder, a cache that cannot be written, no shared memory, JAX in float64."""

import os
import sys
import types

import jax
import pytest

from moe_jax import chips, cli, data, terminal
from moe_jax.config import DataConfig
from moe_jax.data import batches, sources
from moe_jax.errors import ConfigError, UserError


def test_no_home_folder(monkeypatch):
    """A process without HOME and without an entry in the password file, as in some containers."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("MOE_JAX_CACHE", raising=False)
    with pytest.raises(ConfigError, match=r"data\.cache_dir='': no home folder is known for ~.*; set \$MOE_JAX_CACHE"):
        data.cache_folder(DataConfig())
    with pytest.raises(UserError, match=r"^~/a: no home folder is known for ~"):
        cli.expanded("~/a")
    monkeypatch.setenv("MOE_JAX_CACHE", "/somewhere")
    assert str(data.cache_folder(DataConfig())) == "/somewhere" and str(cli.expanded("a/~b")) == "a/~b"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path, why in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(ConfigError, match=rf"cannot be kept in {path} \({why}\); set \$MOE_JAX_CACHE or"):
            sources.check_cache(DataConfig(cache_dir=str(path)))

    def refuses(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(sources.tempfile, "TemporaryFile", refuses)
    with pytest.raises(ConfigError, match=r"\(Read-only file system\)"):
        sources.check_cache(DataConfig(cache_dir=str(tmp_path)))


def test_readers_without_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARED_MEMORY", tmp_path)
    free = lambda size: monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size))
    free(6 * 2**20)
    batches.check_shared_memory(2, 2**20)
    free(6 * 2**20 - 1)
    with pytest.raises(
        ConfigError, match=r"num_workers=2: reader processes need up to 6.0 MiB in .*; nearest valid: 0"
    ):
        batches.check_shared_memory(2, 2**20)
    monkeypatch.setattr(batches.tempfile, "TemporaryFile", lambda **_: os.open(tmp_path / "no" / "file", os.O_RDONLY))
    with pytest.raises(ConfigError, match=r"cannot be written \(No such file or directory\); nearest valid: 0"):
        batches.check_shared_memory(2, 2**20)


def test_float64_is_switched_off(monkeypatch, capsys):
    """JAX_ENABLE_X64=1: sampling ended in a traceback, after the whole of training."""
    monkeypatch.setattr(cli.app, "run", lambda *_, **__: None)
    monkeypatch.setattr(terminal, "outlive_readers", lambda: None)
    monkeypatch.setattr(cli, "use_whole_gpus", lambda: None)
    jax.config.update("jax_enable_x64", True)
    try:
        cli.run(lambda argv: None)
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert "JAX_ENABLE_X64 is switched off" in capsys.readouterr().err


def test_a_reader_that_ends_first_ends_no_run(monkeypatch):
    """`python train.py | head -1`, or a terminal that is gone."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stdout:
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, stdout)
        terminal.outlive_readers()
        print("a line", flush=True)
        print("another", flush=True)
        assert os.path.samestat(os.fstat(sys.stdout.fileno()), os.stat(os.devnull))


def test_libtpu_is_quiet_where_jax_finds_no_tpu(monkeypatch):
    for name in (*chips.ABSENT_TPU, "TPU_SKIP_MDS_QUERY", "TPU_ML_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    cli.quiet_absent_tpu()
    assert not set(chips.ABSENT_TPU) & set(os.environ)  # a TPU is there
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")  # what JAX sets if one is, whatever the user has set
    cli.quiet_absent_tpu()
    assert "TPU_ACCELERATOR_TYPE" not in os.environ
    monkeypatch.delenv("TPU_ML_PLATFORM")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    cli.quiet_absent_tpu()
    found = {name: os.environ.get(name) for name in chips.ABSENT_TPU}
    for name in chips.ABSENT_TPU:
        monkeypatch.setenv(name, "")  # removed after the test
    assert found == chips.ABSENT_TPU | {"TPU_WORKER_ID": "3"}
