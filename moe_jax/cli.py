"""The command line of all programs: a mistake of the user is printed as one line, without traceback; exit status 2."""

import difflib
import errno
import functools
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from moe_jax import ending, startup, terminal
from moe_jax.chips import ABSENT_TPU
from moe_jax.errors import ONE_LINE, ConfigError, FileError, UserError

# Parsers of a value on the command line, by the type of the field that it replaces.
PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}

# Groups whose entries the user names, and how a config file makes an entry.
_ENTRIES = {
    "data.labels": "1",
    "data.sources": "config.source(kind='files', path='…')",
    "loss.more": "config.router_loss(kind='load_balance', coef=0.01, balance_batch=1)",
    "optim.groups": "config.parameter_group(match='^embed$', weight_decay=0.0)",
}

HEARTBEAT = 20  # seconds after which a process that does not answer counts as dead
GPU_SHARE = 0.9  # share of a GPU's memory for JAX (JAX's default: 0.75); CUDA and NCCL need the rest


flags.disclaim_key_flags()  # --help of a program lists the flags defined here as its own


# --- the config file and its overrides -------------------------------------------------------------------------------


def define_config() -> flags.FlagHolder:
    """Defines --config, whose value is the ConfigDict of a config file, and the overrides --config.FIELD=VALUE."""
    try:
        text = (
            "config file, e.g. configs/quickstart.py; --config.FIELD=VALUE after it sets a field, e.g. "
            "--config.train.steps=200. All fields, their ranges and defaults: docs/config.md"
        )
        holder = config_flags.DEFINE_config_file("config", help_string=text)
    except flags.Error as e:  # DEFINE_config_file already reads the command line
        _stop(str(e).removeprefix("ERROR:: "))
    flags.FLAGS["config"].parser = _ConfigParser()
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])  # so that --help lists it
    return holder


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file and checks the overrides of sys.argv against it, before ml_collections applies them."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        file, *argument = path.split(":", 1)
        file = os.path.expanduser(file)
        config = _load(file, argument)
        argv = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        for i, text in enumerate(argv):
            if found := re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", text, re.DOTALL):
                off, name, value = found.groups()
                check_override(config, name, None if off else value if value is not None else argv[i + 1 : i + 2])
        config.lock()
        return config


def _load(file: str, argument: list[str]) -> ml_collections.ConfigDict:
    """The ConfigDict that get_config() of a file returns. Raises UserError."""
    path = Path(file)
    if not path.is_file():
        folder = next((p for p in (path, path.parent, Path("configs")) if p.is_dir() and p != Path()), Path())
        close = difflib.get_close_matches(file, [p.as_posix() for p in sorted(folder.glob("*.py"))], 1, 0.0)
        rule = "is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(f"--config={file}: {rule}; nearest valid: {close[0] if close else 'configs/quickstart.py'}")
    module = sys.modules["config_file"] = types.ModuleType("config_file")
    module.__file__ = file
    try:
        exec(compile(path.read_bytes(), file, "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={file}: defines no function get_config(); see configs/debug.py")
        config = module.get_config(*argument)
    except SyntaxError as e:
        text = (e.text or "").strip()
        raise UserError(f"--config={e.filename}: line {e.lineno}, `{text}`: {e.msg}") from e
    except UserError:
        raise
    except ConfigError as e:
        raise UserError(f"--config={file}: {_line_of(file, e)}{e}") from e
    except Exception as e:
        raise UserError(f"--config={file}: {_line_of(file, e)}{_describe(e)}") from e
    if not isinstance(config, ml_collections.ConfigDict):
        rule = f"get_config() must return a ConfigDict, not {type(config).__name__}"
        raise UserError(f"--config={file}: {rule}; start from config.default_config()")
    return config


def _line_of(file: str, error: Exception) -> str:
    """Line number and source of the line of the config file that raised an exception; "" if none did.

    Also "" for a mistake that the file itself reports: it is the user's, and not in that line.
    """
    stack = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ConfigError | FileError) and stack[-1].filename == file:
        return ""
    frames = [f for f in stack if f.filename == file]
    return f"line {frames[-1].lineno}, `{frames[-1].line}`: " if frames else ""


def _describe(error: Exception) -> str:
    """A short message for an exception of a config file. For a misspelt field it names the nearest valid one."""
    text = str(error.args[0]) if error.args else str(error)
    name = re.search(r"[\"'](\w+)\\*[\"']", text)
    if isinstance(error, AttributeError | KeyError) and name:
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            holder = frame.f_locals.get("self")
            if isinstance(holder, ml_collections.ConfigDict) and name[1] not in holder:
                return f"is not a field; nearest valid name: {_nearest(holder, holder, name[1])}"
    return f"{type(error).__name__}: {text}"


def check_override(config: ml_collections.ConfigDict, name: str, value: str | list[str] | None) -> None:
    """Raises UserError unless `name` of `--config.name=value` is a field and the value has its type.

    value: a list with the next argument if there is no `=`.
    """
    try:
        parts = config_path.split(name)
    except ValueError:
        raise UserError(f"config.{name}: is not a field name") from None
    held: Any = config
    for i, part in enumerate(parts):
        here = ".".join(map(str, ["config", *parts[:i]]))
        if not isinstance(held, ml_collections.ConfigDict):
            rule = f"{here} is a value of type {type(held).__name__} and has no fields"
            raise UserError(f"{here}.{part}: is not a field; {rule}")
        if part not in held:
            hints = [f"nearest valid name: {_nearest(config, held, str(part))}"] if len(held) else []
            if made := _ENTRIES.get(here.removeprefix("config.")):
                hints.append(f"a config file makes a new entry: {here} = {{'{part}': {made}}}")
            raise UserError("; ".join([f"{here}.{part}: is not a field", *hints]))
        kind, held = held.get_type(part), held[part]
    if isinstance(held, ml_collections.ConfigDict) and not str(value).startswith("{"):  # a dict literal may replace it
        hint = f"nearest valid: --config.{name}.{next(iter(held), '')}=…"
        raise UserError(ConfigError(name, value, "is a group of fields; set one of them", hint))
    if kind in PARSERS and not (kind is bool and not isinstance(value, str)):
        text = value if isinstance(value, str) else value[0] if value else ""
        try:
            PARSERS[kind].parse(text)
        except (TypeError, ValueError):
            raise UserError(ConfigError(name, text, f"must be of type {kind.__name__}")) from None


def _nearest(config: ml_collections.ConfigDict, holder: ml_collections.ConfigDict, name: str) -> str:
    """The field of `holder` most similar to `name`. Without a good match, the path of that name in another group."""
    close = difflib.get_close_matches(name, list(holder), 1)
    if not close:
        close = [path for path in _paths(config) if path.rsplit(".")[-1] == name]
    return (close or difflib.get_close_matches(name, list(holder), 1, 0.0) or ["none"])[0]


def _paths(config: ml_collections.ConfigDict, prefix: str = "config") -> list[str]:
    out = []
    for name, value in config.items():
        out.append(f"{prefix}.{name}")
        if isinstance(value, ml_collections.ConfigDict):
            out += _paths(value, f"{prefix}.{name}")
    return out


# --- paths -----------------------------------------------------------------------------------------------------------


def expanded(path: str) -> Path:
    """A path with the home folder in place of `~` at its start, which shells do not replace in `--workdir=~/a`."""
    return Path(_expanded(path))


def _expanded(path: str) -> str:
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: no home folder is known for {path.split('/')[0]}; write the full path")
    return found


class _PathParser(flags.ArgumentParser):
    def parse(self, path: str) -> str:
        if not path:  # `--workdir=$FOLDER` where FOLDER is not set; an empty path would be the current folder
            raise ValueError("is empty; name a path")
        return _expanded(path)


class _PathsParser(flags.ListParser):
    def parse(self, paths: str | list[str]) -> list[str]:
        return [_expanded(path) for path in super().parse(paths)]


def define_path(name: str, default: str | None, text: str, required: bool = False) -> flags.FlagHolder:
    """Defines a flag whose value is a path."""
    return flags.DEFINE(_PathParser(), name, default, text, serializer=flags.ArgumentSerializer(), required=required)


def define_paths(name: str, default: list[str] | None, text: str, required: bool = False) -> flags.FlagHolder:
    """Defines a flag whose value is a list of paths, separated by commas."""
    serializer = flags.CsvListSerializer(",")
    return flags.DEFINE(_PathsParser(), name, default, text, serializer=serializer, required=required)


# --- running ---------------------------------------------------------------------------------------------------------


def check_writable(workdir: str | os.PathLike, flag: str = "--workdir") -> Path:
    """Makes the directory that a flag names. Raises UserError if it cannot be made or written to."""
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if path.is_symlink():
            raise UserError(f"{flag}={path}: is a link to {os.readlink(path)}, which does not exist") from None
        raise UserError(f"{flag}={path}: is a file; name a new directory or one of an earlier run") from None
    except OSError as e:
        raise UserError(f"{flag}={path}: cannot be made ({e.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={path}: is not writable")
    return path


def check_earlier(earlier: int | None, step: int | None, steps: list[int]) -> None:
    """Raises UserError unless eval.py's --earlier is a checkpoint of the run before the one that is evaluated."""
    before = [s for s in steps if s < (steps[-1] if step is None else step)] if steps else []
    if earlier is None or earlier in before:
        return
    valid = (
        f"nearest valid: {min(before, key=lambda s: abs(s - earlier))}" if before else "the run keeps no earlier one"
    )
    raise UserError(
        f"--earlier={earlier}: is not a checkpoint before the one evaluated; {valid}; see train.keep_checkpoints"
    )


def _stop(message: object) -> None:
    text = " ".join(str(message).split())
    text = text if len(text) <= 2000 else f"{text[:2000]}…"  # a name or a value may have any length
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def _parse(argv: list[str], take: Callable[[list[str]], list[str]]) -> list[str]:
    """The arguments that are left after absl's parser. Errors, those of the config file included, become one line."""
    try:
        return flags.FLAGS(take(argv))
    except flags.UnrecognizedFlagError as e:
        if e.flagname.startswith("config.") and "config" in flags.FLAGS:
            _stop(f"--{e.flagname} needs a config file before it, for example --config=configs/quickstart.py")
        close = difflib.get_close_matches(e.flagname, list(flags.FLAGS), 1)
        _stop(f"unknown flag --{e.flagname}" + (f"; nearest valid: --{close[0]}" if close else "; see --help"))
    except flags.Error as e:
        needed = re.fullmatch(r"flag --(\w+)=None: .* must have a value other than None\.", str(e))
        _stop(f"--{needed[1]} is needed, for example --{needed[1]}=runs/a" if needed else e)
    except (ConfigError, UserError) as e:
        _stop(e)
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # raised by ml_collections
        names = [a.split("=")[0].removeprefix("--") for a in argv[1:] if re.match(r"--config\.", a)]
        where = f" (from {', '.join(names)})" if names else ""
        _stop(f"{type(e).__name__} in the config{where}: {str(e.args[0]) if e.args else e}")


def keep_compiled(folder: Path) -> None:
    """Makes JAX keep compiled programs in `folder`, so that the same run starts faster the next time.

    Call it before anything is compiled. $JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Programs that compile fast are kept too: initialisation consists of many of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_whole_gpus() -> None:
    """Lets JAX use the share `GPU_SHARE` of each GPU's memory. Call it before the first use of a device.

    $XLA_CLIENT_MEM_FRACTION, or its former name $XLA_PYTHON_CLIENT_MEM_FRACTION, sets another share.
    """
    if not any(map(os.environ.get, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"))):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)


def quiet_absent_tpu() -> None:
    """Keeps libtpu, where it is installed, from printing about a TPU that is not there. Call it before the first use
    of a device.

    JAX sets TPU_SKIP_MDS_QUERY when it is imported on a machine without a TPU. On a machine with one the user may set
    it, and JAX sets TPU_ML_PLATFORM. What the user has set stays.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1" and "TPU_ML_PLATFORM" not in os.environ:
        for name, value in ABSENT_TPU.items():
            os.environ.setdefault(name, value)


def join_processes() -> None:
    """Joins the processes of a run with `jax.distributed.initialize()`. Raises UserError.

    On TPU pods and under SLURM JAX finds the other processes by itself. Elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. If a process does not answer for HEARTBEAT seconds, the others end.
    """
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=count and int(count), process_id=index and int(index),
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"--distributed: {e}; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def _end_with_the_others(error: Exception) -> None:
    """Ends this process at once, after a computation over all processes failed, most often because one has died.

    A normal exit would wait at the shutdown barrier for the dead process.
    """
    traceback.print_exception(error)
    line = " ".join(str(error).split())[:300]
    who = f"process {jax.process_index()} of {jax.process_count()}"
    why = f"another process has died, or a computation over all of them failed ({line})"
    print(
        f"error: {who} ends: {why}; run the same command to resume from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(3)


def _out_of_memory(error: Exception) -> str:
    """The message for an out-of-memory error. Its suggestions have a fixed order: the memory needed is unknown here."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    allowed = f", of which JAX may use {limit / 2**30:.1f} GiB a device" if limit else ""
    line = " ".join(str(error).split()).removeprefix("RESOURCE_EXHAUSTED: ")[:200]
    return (
        f"not enough memory on {device.device_kind}{allowed} ({line}); saved checkpoints are intact. Training "
        "needs less with, the cheapest first: --config.model.remat=selective, --config.train.micro_batches=N, "
        "--config.model.remat=full, more devices on --config.mesh.fsdp, --config.model.param_dtype=bfloat16; "
        "train.py --compile_only tells before a run whether it fits"
    )


def run(main: Callable[[list[str]], None], take: Callable[[list[str]], list[str]] = list) -> None:
    """Runs `main` with absl's `app.run`, and prints errors that the user can mend as one line.

    take: of the arguments, returns those that are left for the flags.
    """

    def guarded(argv):
        try:
            main(argv)
        except ONE_LINE as e:
            _stop(e)
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                _stop(f"{str(e.filename)[:200]}…: {e.strerror}")
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({e.filename})" if e.filename else ""
            _stop(
                f"no space left on the device{where}; the newest checkpoint is intact: free some space and run it again"
            )
        except jax.errors.JaxRuntimeError as e:
            if jax.process_count() > 1:
                _end_with_the_others(e)
            if not str(e).startswith("RESOURCE_EXHAUSTED"):
                raise
            _stop(_out_of_memory(e))
        except (RuntimeError, AssertionError) as e:  # JAX raises AssertionError for a platform that it cannot start
            if not traceback.extract_tb(e.__traceback__)[-1].filename.endswith("xla_bridge.py"):
                raise
            rule = f"JAX_PLATFORMS={jax.config.jax_platforms!r}: JAX finds no such device here"
            _stop(f"{rule}{f' ({e})' if str(e) else ''}; nearest valid: 'cpu', or unset it to use the fastest device")

    if jax.config.jax_enable_x64:
        print("JAX_ENABLE_X64 is switched off: moe_jax computes in float32 and bfloat16 only", file=sys.stderr)
        jax.config.update("jax_enable_x64", False)
    terminal.outlive_readers()
    terminal.replace_unprintable()
    use_whole_gpus()
    quiet_absent_tpu()
    startup.keep_freed_memory()
    logging.set_verbosity(logging.WARNING)  # Orbax logs every action at INFO
    app.run(ending.without_waiting(guarded), flags_parser=functools.partial(_parse, take=take))
