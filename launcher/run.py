"""The one entry: `deepspeed launcher/run.py --config C [key=value ...]`, perhaps with `--plan`,
`--check` or `--resume`.

Equally `mpirun -n N python launcher/run.py`, `torchrun launcher/run.py`, plain `python
launcher/run.py` for one process, and `python -m launcher.run`.
"""

import sys
from pathlib import Path

if not __package__:
    # Started as a script: Python put this folder, not the project, in front of the search path,
    # where its modules would hide others of the same name (`distributed`, for example).
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import errno
import math
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from launcher import distributed, watchdog
from launcher.config import METHODS, Config, load_config, read_text
from launcher.errors import InputError
from launcher.watchdog import RESUMABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code (0 done, 2 wrong input, 75 resumable)."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.check:
            return _check(config)
        if arguments.plan:
            return _plan(config)
        return _run(config, resume=arguments.resume)
    except InputError as error:
        return distributed.fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return distributed.fail(InputError("run.dir: no space left on its disk; free some"))
    except KeyboardInterrupt:
        # A launcher stops the others when one rank has died, which is what to tell then.
        watchdog.verdict(0.5)
        return _resumable()
    except RuntimeError as error:
        if distributed.is_device_failure(error):
            return distributed.fail_with_device(error)
        # What a collective raises when another rank is gone.
        code = watchdog.verdict()
        if code is None:
            raise
        return _resumable() if code == RESUMABLE else code
    finally:
        distributed.stop()


def _run(config: Config, *, resume: bool) -> int:
    # Imported here: seconds of imports should not stand before a mistake in the config.
    from launcher import engine, run_folder, training
    from launcher.method import method_module, read_data
    from launcher.training_log import peak_memory

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    world = distributed.start()
    module = method_module(config)
    with run_folder.opened(config, world, resume=resume):
        if resume:
            config = run_folder.kept_choices(config)
        dataset = distributed.together(world, lambda: read_data(config, module))
        config = engine.resolve(config, world, module, dataset)
        settled = distributed.on_rank_0(
            world, lambda: run_folder.settle(config, dataset, module, resume=resume)
        )
        config = read_text(settled, source=str(config.run_dir / "config.yaml"))
        if module.TRAINS:
            run_folder.check_shared(config, world)
        alive = [engine.zero_3_loading(config, trains=module.trains_model(config))]
        begun = time.monotonic()
        method: Any = distributed.together(world, lambda: module.build(config, dataset.labels))
        peak = distributed.max_over_ranks(world, peak_memory(world.device)) / 2**30
        if world.rank == 0 and config.model.path:
            seconds = time.monotonic() - begun
            print(f"loaded in {seconds:.1f} s, memory at most {peak:.2f} GiB a rank", flush=True)
        trained = run_folder.trained_parameters(method) if module.TRAINS else 0
        run_folder.check_space(config, world, trained)
    splits = dataset.splits
    if module.TRAINS and config.train.lr_range_test:
        training.range_test(config, method, world, splits["train"])
        return 0
    if module.TRAINS:
        dev = splits.get("dev")
        try:
            training.train(config, method, world, splits["train"], dev, resume=resume)
        except training.Stopped:
            return _resumable()
        shown = splits["train"] if dev is None else dev
        training.export(config, method, world, shown["text"].slice(0, 100).to_pylist())
    else:
        if hasattr(method, "fit"):
            run_folder.check_shared(config, world)
            distributed.on_rank_0(world, lambda: method.fit(splits, config.run_dir))
            distributed.together(world, lambda: method.load_export(config.run_dir))
        alive.append(engine.place_for_scoring(config, method, world))
    if module.CLASSIFIES:
        for split in config.data.evaluate:
            engine.score_split(
                config, method, world, split, splits[split], dataset.labels, dataset.provenance
            )
        # What is fitted has no parameters that could be counted in one way.
        run_folder.finish(
            config, world, method.notes(), None if hasattr(method, "fit") else trained
        )
    del alive
    if world.rank == 0:
        print(f"done: {config.run_dir}", flush=True)
    return 0


def _check(config: Config) -> int:
    """Validate everything that a run would need, without running; rank 0 alone speaks."""
    if distributed.rank_before_start() != 0:
        return 0
    from launcher.method import method_module, read_data

    module = method_module(config)
    dataset = read_data(config, module)
    lines = [f"method: {config.method}", f"labels: {', '.join(dataset.labels)}"]
    lines += [f"data: {split}, {len(table):,} texts" for split, table in dataset.splits.items()]
    lines += module.check(config, dataset)
    print("\n".join([*lines, "ok"]))
    return 0


def _plan(config: Config) -> int:
    """Tell what each way to share the model takes, without running; rank 0 alone speaks."""
    from launcher import machine, plan_text
    from launcher.method import method_module, read_data

    module = method_module(config)
    hardware = machine.named(config, int(os.environ.get("WORLD_SIZE", "1")))
    if hardware is None:
        world = distributed.start()
        nodes = math.ceil(world.size / distributed.local_world_size())
        ranks = config.hardware.cards or world.size
        hardware = machine.found(config, world.device, ranks, nodes=nodes)
    if distributed.rank_before_start() != 0:
        return 0
    dataset = read_data(config, module)
    print("\n".join(plan_text.show(config, module, dataset, hardware)))
    return 0


def _resumable() -> int:
    if distributed.rank_before_start() == 0:
        print("stopped; the same command with --resume goes on from here", file=sys.stderr)
    watchdog.goodbye(RESUMABLE)
    return RESUMABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launcher/run.py",
        description="Run one experiment: " + ", ".join(METHODS) + ".",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override, as in train.lr=1.0e-3"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="validate everything, run nothing")
    mode.add_argument("--plan", action="store_true", help="tell memory and time, run nothing")
    mode.add_argument("--resume", action="store_true", help="go on with a stopped run")
    # The DeepSpeed launcher appends it; the same number stands in LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    distributed.leave(main())
