"""The ``hwprune`` command. Exit status: 0 done, 1 a check failed (verify, a target), 2 a bad request, 3 an unexpected error.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fxprune
from fxprune import model_spec, report_html
from fxprune.config import Config
from fxprune.doctor import doctor
from fxprune.errors import ConfigError, FxPruneError, FxPruneWarning, VerificationError
from fxprune.export import FORMATS
from fxprune.model_spec import Subject
from fxprune.report import Table

Command = Callable[[argparse.Namespace], int]
_FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` without the program's name. Returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", FxPruneWarning)
            warnings.showwarning = _one_line
            torch.set_num_threads(args.threads or torch.get_num_threads())
            return int(args.run(args))
    except VerificationError as error:
        return _fail(error, 1, args.debug)
    except FxPruneError as error:
        return _fail(error, 2, args.debug)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _fail(error, 3, args.debug)


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    text = str(error) if isinstance(error, FxPruneError) else f"{type(error).__name__}: {error} (--debug shows where)"
    print("hwprune: " + " ".join(text.split()), file=sys.stderr)
    return status


def _one_line(message: Warning | str, *rest: Any, **more: Any) -> None:
    print("hwprune: warning: " + " ".join(str(message).split()), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hwprune", description="Prune PyTorch models and run them fast.", epilog=_EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hwprune {fxprune.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (run, text, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument("--threads", type=int, help="threads of torch")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name != "doctor":
            _model_arguments(command)
        for flags, options in arguments:
            command.add_argument(*flags, **options)
    return parser


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=f"{model_spec._FORMS}; .py and .pt2 files are code: name only what you trust")
    command.add_argument("--shape", action="append", type=_shape, default=[], metavar="1x3x224x224",
                         help="shape of an input, once for each; default: what the model suggests")  # fmt: skip
    command.add_argument("--batch", type=int, default=1, help="batch size of the suggested inputs")
    command.add_argument("--seed", type=int, default=0, help="of random weights and inputs")
    command.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    command.add_argument("--weights", metavar="STATE.pt", help="a state_dict to load (with weights_only=True)")
    command.add_argument("--plan", metavar="PLAN.json", help="a plan to apply before anything else")
    command.add_argument("--sparsity", type=_sparsity, metavar="0.6|depthwise=0.8,linear=0.5", help="fraction of zeros")
    command.add_argument("--option", action="append", type=_option, default=[], metavar="NAME=VALUE",
                         help="a field of fxprune.Config (docs/options.md), as often as needed")  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it like 1x3x224x224") from None


def _sparsity(text: str) -> float | dict[str, float]:
    try:
        if "=" not in text:
            return float(text)
        return {key: float(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no sparsity; write 0.6 or depthwise=0.8,linear=0.5") from None


def _option(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r} is no option; write NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _subject(args: argparse.Namespace) -> Subject:
    subject = model_spec.build(args.model, args.shape, args.batch, args.pretrained, args.seed)
    if args.weights:
        try:
            subject.model.load_state_dict(torch.load(args.weights, weights_only=True, map_location="cpu"))
        except Exception as error:
            raise ConfigError(name="--weights", given=args.weights, expected=f"a state_dict of it ({error})") from error
    if args.plan:
        fxprune.apply_plan(subject.model, fxprune.load_plan(args.plan))
    return subject


def _pruned(args: argparse.Namespace) -> Subject:
    """The model, pruned when a sparsity is given."""
    subject = _subject(args)
    if args.sparsity is None:
        return subject
    options = dict(args.option)
    return Subject(fxprune.prune(subject.model, subject.inputs, sparsity=args.sparsity, **options).model, subject.inputs)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    given = dict(args.option)
    return given if args.sparsity is None else {"sparsity": args.sparsity, **given}


def _show(args: argparse.Namespace, table: Table, **more: Any) -> int:
    if args.json:
        print(Table(table.title, table.head, table.rows, {**table.summary, **more}).to_json())
    else:
        print(table)
        for key, value in more.items():
            print(f"{key}: {value}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    subject = _subject(args)
    table = fxprune.explain(subject.model, subject.inputs, **_asked(args))
    if args.html:
        plan, dense = fxprune.Plan.of(subject.model), None
        if args.sparsity is not None:
            plan, dense = fxprune.prune(subject.model, subject.inputs, **_asked(args)).plan, subject.model
        stairs = fxprune.levels(subject.model, subject.inputs, autotune="off")
        graphs = fxprune.stages(subject.model, subject.inputs, **_asked(args))
        report_html.write(args.html, title=args.model, explain=table, levels=stairs, plan=plan, dense=dense, stages=graphs)
    return _show(args, table)


def _prune(args: argparse.Namespace) -> int:
    subject = _subject(args)
    goal = {"sparsity": args.sparsity, "target_speedup": args.speedup, "target_latency_ms": args.latency_ms}
    result = fxprune.prune(subject.model, subject.inputs, **goal, **dict(args.option))
    if args.output:
        torch.save(result.model.state_dict(), args.output)
    if args.save_plan:
        result.plan.save(args.save_plan)
    _show(args, result.report, sparsity={key: round(value, 4) for key, value in result.sparsity.items()})
    return 0 if result.speed is None or result.speed.reached else 1


def _sensitivity(args: argparse.Namespace) -> int:
    if args.sparsity is not None:
        raise ConfigError(name="--sparsity", given=args.sparsity, expected="--sparsities 0.25 0.5 ..., each tried alone")
    subject = _subject(args)
    table = fxprune.sensitivity(subject.model, subject.inputs, sparsities=tuple(args.sparsities), **dict(args.option))
    if args.html:
        report_html.write(args.html, title=args.model, sensitivity=table)
    return _show(args, table)


def _bench(args: argparse.Namespace) -> int:
    subject = _pruned(args)
    table = fxprune.benchmark(subject.model, subject.inputs, rounds=args.rounds, **dict(args.option))
    if args.html:
        explained = fxprune.explain(subject.model, subject.inputs, **dict(args.option))
        plan = fxprune.Plan.of(subject.model)
        report_html.write(args.html, title=args.model, benchmark=table, explain=explained, plan=plan)
    return _show(args, table)


def _verify(args: argparse.Namespace) -> int:
    subject = _pruned(args)
    return _show(args, fxprune.verify(subject.model, subject.inputs, **dict(args.option)))


def _export(args: argparse.Namespace) -> int:
    subject = _pruned(args)
    shapes = "batch" if args.dynamic_batch else None
    written = fxprune.export(
        subject.model, subject.inputs, args.output, format=args.format, dynamic_shapes=shapes, **dict(args.option)
    )
    about = {"path": str(written.path), "bytes": written.bytes, "dense bytes": written.dense_bytes}
    if written.partition is not None:
        about["partition"] = str(written.partition)
    if args.json:
        return _show(args, written.report, **about)
    print(written)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    return _show(args, doctor())


_HTML = (("--html",), {"metavar": "PAGE.html", "help": "also write a self-contained page"})
_COMMANDS: dict[str, tuple[Command, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "explain": (_explain, "what would be pruned or runs sparse, per layer, with times and reasons", [_HTML]),
    "prune": (
        _prune,
        "write zeros into a model, by sparsity or for a speed",
        [
            (("--speedup",), {"type": float, "help": "instead of --sparsity: times faster than stock torch.compile"}),
            (("--latency-ms",), {"type": float, "help": "instead of --sparsity: milliseconds per call"}),
            (("-o", "--output"), {"metavar": "STATE.pt", "help": "where the pruned state_dict goes"}),
            (("--save-plan",), {"metavar": "PLAN.json", "help": "where the plan goes"}),
        ],
    ),
    "sensitivity": (
        _sensitivity,
        "what pruning one layer alone costs",
        [_HTML, (("--sparsities",), {"type": float, "nargs": "+", "default": [0.25, 0.5, 0.75, 0.875]})],
    ),
    "bench": (
        _bench,
        "time eager, torch.compile and hwprune in turns",
        [_HTML, (("--rounds",), {"type": int, "default": 20, "help": "interleaved rounds"})],
    ),
    "verify": (_verify, "compare the compiled model with an fp64 run; status 1 when it differs", []),
    "export": (
        _export,
        "write a program that runs without the model's source",
        [
            (("-o", "--output"), {"required": True, "metavar": "PATH"}),
            (("--format",), {"default": "exported_program", "help": ", ".join(FORMATS)}),
            (("--dynamic-batch",), {"action": "store_true", "help": "keep dimension 0 of the inputs free"}),
        ],
    ),
    "doctor": (_doctor, "what is installed, what is missing", []),
}
_EPILOG = """examples:
  hwprune explain timm:mobilenetv2_100 --sparsity 0.6 --html report.html
  hwprune prune model.py:build --speedup 2 -o pruned.pt --save-plan plan.json
  hwprune verify model.py:build --weights pruned.pt --plan plan.json
  hwprune export model.py:build --weights pruned.pt --plan plan.json -o model.pt2 --dynamic-batch"""
