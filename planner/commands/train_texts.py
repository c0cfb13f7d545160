"""planner train texts: what a training reads. Needs the extra [runtime]."""

import hashlib
from pathlib import Path

from planner.commands.configs import valid
from planner.commands.progress import Progress, Silent
from planner.commands.session import open_session
from planner.datasets import expand
from planner.errors import BadInput
from planner.files import read_bytes

WRITTEN_AT_ONCE = 16  # prompts that the target continues side by side


def train_texts(
    model: str, dataset: list[str], out: str | Path, *, length: int = 4096, written: int = 96, prompt_len: int = 1024, output_len: int = 512,
    temperatures: list[float] = (0.0, 0.7, 1.0), top: int = 32, taps: list[int] = (), seed: int = 0, dtype: str = "bfloat16",
    device: str | None = None, progress: Progress = Silent(),
) -> int:  # fmt: skip
    """Write a folder of texts with the teacher's distribution at every position; how many there are.

    Stretches of `length` tokens of the files, and `written` texts of prompt_len + output_len tokens, of which the target
    writes the latter at the temperatures in turn. A folder that was begun is gone on with.
    """
    session = open_session(model, dtype=dtype, device=device)
    from planner.profiler.texts import all_prompts, draw_prompts
    from planner.specs import Sampler
    from planner.training import data

    spec, files = session.model.spec, expand(dataset)
    if not files:
        raise BadInput("texts come from files: give --dataset FILE[,FILE...]")
    if not 2 * data.FIRST_TRAINED <= length <= spec.max_context_len:
        raise BadInput(f"a stretch has {2 * data.FIRST_TRAINED} tokens to the model's {spec.max_context_len}, got {length}; change --length")
    if written < 0 or seed < 0:
        raise BadInput(f"texts that the target writes, and the seed, are at least 0, got {min(written, seed)}; change --written or --seed")
    if written and not (2 <= prompt_len and 2 <= output_len and prompt_len + output_len <= spec.max_context_len):
        raise BadInput(f"prompt and output must fit the model's {spec.max_context_len} tokens, got {prompt_len} + {output_len}; lower one")
    if not 1 <= top <= min(256, spec.vocab_size):
        raise BadInput(f"between 1 and 256 tokens of a distribution are kept, got {top}; change --top")
    if wrong := [layer for layer in taps if not 0 <= layer < spec.num_layers]:
        raise BadInput(f"taps are layers 0 to {spec.num_layers - 1}, got {wrong[0]}; change --taps")
    samplers = [valid(Sampler, temperature=temperature) for temperature in temperatures]
    if written and not samplers:
        raise BadInput("texts that the target writes need at least one temperature, got none; give --temperatures or --written 0")

    stretches = all_prompts(session.tokenizer, files, length=length)
    if not stretches:
        raise BadInput(f"the dataset holds no stretch of {length} tokens; add files or lower --length")
    prompts = draw_prompts(session.tokenizer, files, length=prompt_len, count=written, seed=seed, remedy="lower --written") if written else []
    settings = data.TextsSettings(
        target=session.model.fingerprint, vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, num_layers=spec.num_layers,
        files=[f"{file.name}#{hashlib.sha256(read_bytes(file, 'dataset')).hexdigest()[:8]}" for file in files],
        length=length, written=written, prompt_len=prompt_len, output_len=output_len, temperatures=list(temperatures), top=top, taps=list(taps),
        seed=seed,
    )  # fmt: skip
    folder = Path(out)
    begins = [data.FIRST_TRAINED - 1] * len(stretches) + [prompt_len - 1] * written
    missing = data.open_folder(folder, settings, begins)
    progress.stage("texts", len(missing))

    def add(index: int, tokens: list[int]) -> None:
        data.add_text(folder, index, data.taught(session.model, tokens, top, tuple(taps)))
        progress.advance()

    for index in missing:
        if index < len(stretches):
            add(index, stretches[index].tokens)
    to_write = {index - len(stretches) for index in missing if index >= len(stretches)}
    for number, sampler in enumerate(samplers):
        own = range(number, written, len(samplers))
        for at in range(0, len(own), WRITTEN_AT_ONCE):
            group = own[at : at + WRITTEN_AT_ONCE]
            if to_write.isdisjoint(group):
                continue
            # all of the group, though some may be there: who goes on with a folder gets the texts of who never stopped
            texts = data.write_on(session.model, [prompts[index].tokens for index in group], sampler, output_len, seed * 1_000_003 + group[0])
            for index, tokens in zip(group, texts, strict=True):
                if index in to_write:
                    add(len(stretches) + index, tokens)
    return len(begins)
