"""Audit other people's autograd.Functions: the targets of peers.py, each in a process of its own.

    python tests/check/audit_peers.py [--package P] [--name N] [--json DIR] [--scripts DIR] [--write PEERS.md]

Run with the python of the environment that holds the peers (peers.py says how to make one); packages that are not
installed there are left alone. A line is printed for each target. What was found is kept as one JSON file a target
in --json, so that the page of --write covers all runs that share the folder: the peers take two environments.

A crash or a hang is a verdict: the worker writes down what it is about to ask before it asks. The process is then
started anew without that check.

What is asked of whom:

* Functions in plain torch: the auditor's default checks, in float64, float32, bfloat16 and float16.
* Triton kernels in the interpreter: float32, because the kernels compute in it whatever they are given; and
  float64 for `double_backward` and `raw_gradients`, which need no more digits. `compiled`, `vmap`,
  `batched_gradients` and `jvp` are left out, because under a transform the interpreter has no numbers to work on,
  and so are `autocast`, `dtypes` and `overflow`, because its bfloat16 is garbage.
* Where TorchDynamo is off (forwards that are under torch.compile themselves) `compiled` is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

TASK_LIMIT = 90.0  # seconds for one check at one sample in one dtype
TARGET_LIMIT = 420.0  # for everything that is asked of one target
CRASHES = 6  # so many, and no more is asked of a target
OUT_OF_TIME = "out of time"
ALONE_TOO = ("gradients", "double_backward")  # asked again without the reference where they fail
ALONE = {"unsloth"}  # writes past the end of its tensors: what dies may be the next one

NEEDS_DEVICE = ("compiled", "vmap", "batched_gradients", "jvp", "autocast", "dtypes", "overflow", "cuda_graph")
IN_FLOAT64 = ("double_backward", "raw_gradients")

CLASSES = {
    "a": "wrong values or gradients",
    "b": "side effects",
    "c": "contract",
}
# The class of a failure is that of its check, unless the finding says otherwise.
_SIDE_EFFECTS = {
    "mutation",
    "backward_twice",
    "saved_tensors",
    "leaks",
    "modified_later",
    "interleaved",
    "saved_tensor_hooks",
    "randomness",
    "determinism",
}
_CONTRACT = {"raw_gradients", "non_differentiable", "shared_gradients", "precision", "opcheck"}
_ONLY_CONTRACT = (
    "torch.func refuses",
    "torch.func.vjp raises",
    "computes a gradient for an input that is frozen",
    "cannot be differentiated again, and nothing says so",
    "does not take an undefined output gradient",
    "it raises",
    "the forward raises where a dimension",
    "the backward raises where a dimension",
    "a second backward through a retained graph raises",
    "under autocast the gradient of",
)


def class_of(check: str, what: str) -> str:
    """a, b or c."""
    if check in _CONTRACT or any(words in what for words in _ONLY_CONTRACT):
        return "c"
    return "b" if check in _SIDE_EFFECTS else "a"


def interpreted(target) -> bool:
    """Whether its kernels run in Triton's interpreter."""
    return "TRITON_INTERPRET" in target.env and "No Triton" not in target.note


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(package: str, name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", f"{package}-{name}").strip("_")


# The worker: one target -----------------------------------------------------------------------------------------


def audits_of(target, fn):
    """The audits of one target: what is asked of it, and in which dtypes."""
    import torch

    from bptools.check import Audit
    from bptools.check._check import load_checks

    names = [name for name, check in load_checks().items() if check.default]
    if interpreted(target):
        left = [name for name in names if name not in NEEDS_DEVICE]
        yield Audit(fn, target.samples, target.reference, left, (torch.float32,))
        yield Audit(fn, target.samples, target.reference, IN_FLOAT64, (torch.float64,))
    else:
        if "TORCHDYNAMO_DISABLE" in target.env:
            names.remove("compiled")
        yield Audit(fn, target.samples, target.reference, names)


def work(indices: list[int], journal: Path) -> None:
    """Ask everything of some targets; each question and each answer is a line of the journal."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    past = _lines(journal)
    with journal.open("a", encoding="utf-8") as file:

        def say(**line) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for index in indices:
            mine = [line for line in past if line["target"] == index]
            if not any("end" in line for line in mine):
                _work_on(index, mine, lambda index=index, **line: say(target=index, **line))


def _work_on(index: int, past: list[dict], say) -> None:
    import peers

    from bptools.check import Audit
    from bptools.check._report import _document

    target = peers.TARGETS[index]
    answered = {(line["part"], line["key"]) for line in past if "result" in line}
    banned = {line["crash"] for line in past if "crash" in line}
    say(start="load")
    try:
        fn = target.load()
        parts = list(audits_of(target, fn))
    except Exception as error:
        traceback.print_exc()
        say(end=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    for part, audit in enumerate(parts):
        try:
            tasks = list(audit.tasks())
        except Exception as error:
            traceback.print_exc()
            say(end=f"its samples raise {type(error).__name__}: {error}")
            return
        for task in tasks:
            if task.check.name in banned or (part, task.key) in answered:
                continue
            say(start=task.check.name, part=part, key=task.key)
            result = audit.ask(task)
            document = _document(result) | {"key": task.key}
            if result.verdict == "fail" and task.check.name in ALONE_TOO and target.reference is not None:
                # Against the numerical derivative of the Function's own: which says whose fault it is.
                alone = Audit(fn, target.samples, None, [task.check.name], (task.dtype,)).ask(task)
                if task.check.name == "double_backward" and alone.verdict == "pass":
                    document = _document(alone) | {
                        "key": task.key
                    }  # a reference that is right to first order only
                else:
                    document["alone"] = _document(alone)
            say(result=document, part=part, key=task.key)
    say(end="")


def _lines(journal: Path) -> list[dict]:
    if not journal.exists():
        return []
    found = []
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short by a crash
    return found


# The driver -----------------------------------------------------------------------------------------------------


def groups(chosen: list[tuple[int, object]]) -> list[list[int]]:
    """Targets that share a process: of one package and environment, because an import can take half a minute."""
    found: dict[tuple, list[int]] = {}
    for index, target in chosen:
        key = (target.package, *sorted(target.env.items()), index if target.package in ALONE else "")
        found.setdefault(key, []).append(index)
    return list(found.values())


def audit(indices: list[int], targets, limit: float):
    """What was found out about each target of a group, by workers that may die."""
    with tempfile.TemporaryDirectory() as folder:
        journal, log = Path(folder) / "journal", Path(folder) / "log"
        left = list(indices)
        while left:
            how = _run_worker(left, targets[left[0]].env, journal, log, limit)
            lines = _lines(journal)
            ended = {line["target"] for line in lines if "end" in line}
            if how:  # whoever was at it when the worker died
                at = next(
                    (line for line in reversed(lines) if "start" in line), {"target": left[0], "start": "load"}
                )
                said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
                index = at["target"]
                crashes = sum("crash" in line for line in lines if line["target"] == index)
                last = at["start"] == "load" or how == OUT_OF_TIME or crashes + 1 >= CRASHES
                with journal.open("a", encoding="utf-8") as file:
                    note = {
                        "target": index,
                        "crash": at["start"],
                        "key": at.get("key", ""),
                        "how": how,
                        "said": said,
                    }
                    file.write("\n" + json.dumps(note) + "\n")
                    if last:
                        file.write(
                            json.dumps({"target": index, "end": "" if at["start"] != "load" else how}) + "\n"
                        )
                        ended.add(index)
                lines = _lines(journal)
            for index in [i for i in left if i in ended]:
                yield _found(index, targets[index], [line for line in lines if line["target"] == index])
            left = [i for i in left if i not in ended]


def _found(index: int, target, lines: list[dict]) -> dict:
    return {
        "package": target.package,
        "version": installed(target.package),
        "name": target.name,
        "index": index,
        "note": target.note,
        "interpreted": interpreted(target),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "python": platform.python_version(),
        "broken": next((line["end"] for line in lines if "end" in line), ""),
        "crashes": [line for line in lines if "crash" in line],
        "results": [line["result"] for line in lines if "result" in line],
    }


def _run_worker(indices: list[int], env: dict[str, str], journal: Path, log: Path, limit: float) -> str:
    """How it ended: "" if it got through, else in words."""
    command = [sys.executable, __file__, "--worker", str(journal), *map(str, indices)]
    with log.open("ab") as out:
        worker = subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=out, start_new_session=True)
        try:
            size, since, at, begun = -1, time.monotonic(), None, time.monotonic()
            while worker.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                if (grown := journal.stat().st_size if journal.exists() else -1) != size:
                    size, since = grown, now
                    lines = _lines(journal)
                    if lines and lines[-1]["target"] != at:
                        at, begun = lines[-1]["target"], now
                if now > begun + limit:
                    return OUT_OF_TIME
                if now > since + TASK_LIMIT:
                    return f"gives no answer in {TASK_LIMIT:.0f} s"
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    code = worker.returncode
    if code == 0:
        return ""
    return f"crashes the process ({signal.Signals(-code).name})" if code < 0 else f"ends the process with {code}"


def failures(found: dict) -> list[dict]:
    """One entry for each finding: check, class, what, the first failure, and where else it fails."""
    grouped: dict[tuple[str, str], list[dict]] = {}
    for result in found["results"]:
        if result["verdict"] == "fail":
            letter = class_of(result["check"], result["failure"]["what"] if result.get("failure") else "")
            grouped.setdefault((letter, result["check"]), []).append(result)
    entries = [
        {"class": letter, "check": check, "first": results[0], "count": len(results)}
        for (letter, check), results in sorted(grouped.items(), key=lambda item: item[0][0])
    ]
    for crash in found["crashes"]:
        if crash["how"] != OUT_OF_TIME:
            first = {"failure": {"what": f"{crash['how']} in {crash['key'] or crash['check']}"}, "dtype": ""}
            entries.insert(0, {"class": "a", "check": crash["crash"], "first": first, "count": 1})
    return entries


def summary(found: dict) -> str:
    """One line."""
    counts = {
        v: sum(r["verdict"] == v for r in found["results"]) for v in ("pass", "fail", "unsupported", "skipped")
    }
    said = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    head = f"{found['package']} {found['version']} {found['name']}: "
    if found["broken"]:
        return f"{head}does not run: {found['broken']}"
    by_class = []
    for letter in CLASSES:
        names = [e["check"] for e in failures(found) if e["class"] == letter]
        if names:
            by_class.append(f"({letter}) {' '.join(dict.fromkeys(names))}")
    cut = "; OUT OF TIME" if any(c["how"] == OUT_OF_TIME for c in found["crashes"]) else ""
    seconds = sum(r["seconds"] for r in found["results"])
    return f"{head}{said or 'nothing asked'}; {'; '.join(by_class) or 'clean'}{cut}; {seconds:.1f} s"


def save_scripts(found: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for result in found["results"]:
        script = (result.get("failure") or {}).get("script")
        name = slug(found["package"], found["name"]) + "-" + re.sub(r"[^A-Za-z0-9_]+", "_", f"{result['key']}")
        if script:
            (folder / f"{name}.py").write_text(script, encoding="utf-8")
        alone = ((result.get("alone") or {}).get("failure") or {}).get("script")
        if alone:
            (folder / f"{name}-alone.py").write_text(alone, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", help="only this package's targets")
    parser.add_argument("--name", help="only targets whose name holds this")
    parser.add_argument("--json", type=Path, help="a folder for one JSON file a target; read by --write as well")
    parser.add_argument("--scripts", type=Path, help="a folder for the scripts that reproduce the failures")
    parser.add_argument("--write", type=Path, help="the Markdown page to write, of all that is in --json")
    parser.add_argument("--limit", type=float, default=TARGET_LIMIT, help="seconds for one target")
    parser.add_argument("--page-only", action="store_true", help="run nothing: write the page of --json")
    args = parser.parse_args()
    if args.write and not args.json:
        parser.error("--write needs --json, the folder that it reads")
    import peers

    missing: dict[str, int] = {}
    chosen = []
    for index, target in enumerate(peers.TARGETS if not args.page_only else ()):
        if (args.package or target.package) != target.package or (args.name or "") not in target.name:
            continue
        if installed(target.package) is None:
            missing[target.package] = missing.get(target.package, 0) + 1
        else:
            chosen.append((index, target))
    for group in groups(chosen):
        for found in audit(group, peers.TARGETS, args.limit):
            print(summary(found), flush=True)
            if args.json:
                args.json.mkdir(parents=True, exist_ok=True)
                path = args.json / f"{slug(found['package'], found['name'])}.json"
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            if args.scripts:
                save_scripts(found, args.scripts)
    for package, count in missing.items():
        print(f"{package}: not run, because it is not installed here ({count} targets)")
    if args.write:
        from peers_page import page

        args.write.write_text(page(peers.TARGETS, args.json), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work([int(i) for i in sys.argv[3:]], Path(sys.argv[2]))
    else:
        main()
