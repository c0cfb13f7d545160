"""open_session: which kernels run a model and in which bits its weights are, or why not."""

import sys
from types import SimpleNamespace

import msgspec
import pytest

torch = pytest.importorskip("torch")

from made import made_profile
from tiny import NATIVE, native_kernels, tiny_checkpoint, tiny_model

import planner
from planner.cli import main
from planner.commands.session import check_drafters, check_length, drafter_models, load_drafters, open_session, weights_bytes
from planner.errors import BadInput
from planner.measurements import save_profile
from planner.plans import save_plan
from planner.runtime import native
from planner.runtime.linear import Int4Linear, Int8Linear, Linear
from planner.specs import DrafterSpec


@pytest.fixture(autouse=True)
def tiny_files(monkeypatch):
    """A made-up model in place of the files of a real one."""

    def load(path, dtype, device, rope_theta=None, max_context_len=None):
        given = {"rope_theta": rope_theta, "max_context_len": max_context_len}
        checkpoint = tiny_checkpoint(**NATIVE | {name: value for name, value in given.items() if value is not None})
        return checkpoint._replace(tensors={name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()})

    monkeypatch.setattr("planner.runtime.weights.load_checkpoint", load)

    def load_tokenizer(path):
        return SimpleNamespace(special_tokens=(0, 60), vocabulary={"a": 0, "b": 1 if path.name != "foreign" else 2})

    monkeypatch.setattr("planner.runtime.tokenizer.load_tokenizer", load_tokenizer)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "load_library", native.load_library.__wrapped__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def opened(**options):
    return open_session("made-up", device="cpu", **options)


def test_a_cpu_runs_native_kernels_where_they_can_be_built():
    native_kernels(torch.bfloat16)
    session = opened()
    assert session.model.kernels.execution == "native" and session.warnings == []
    assert session.model.dtype == torch.bfloat16
    assert opened(execution="native", dtype="float32").model.kernels.execution == "native"


def test_eager_is_eager_and_no_reason_for_a_warning():
    session = opened(execution="eager")
    assert session.model.kernels.execution == "eager" and session.warnings == []


def test_without_a_compiler_it_is_eager_with_the_reason_in_a_warning(no_compiler):
    session = opened()
    assert session.model.kernels.execution == "eager"
    (warning,) = session.warnings
    assert "slower" in warning and "need g++ 12" in warning


def test_native_asked_for_and_not_to_be_had_is_refused(no_compiler):
    with pytest.raises(BadInput, match="--execution eager"):
        opened(execution="native")


def test_float16_is_eager_with_a_warning_and_refused_with_native():
    session = opened(dtype="float16")
    assert session.model.kernels.execution == "eager"
    assert "float16" in session.warnings[0]
    with pytest.raises(BadInput, match="got float16; use --execution eager"):
        opened(dtype="float16", execution="native")


@pytest.mark.parametrize(("weights", "kind"), [("full", Linear), ("int8", Int8Linear), ("int4", Int4Linear)])
def test_the_target_has_the_weights_asked_for(weights, kind):
    session = opened(weights=weights, execution="eager")
    assert session.weights == weights
    assert type(session.model.head) is kind
    assert all(type(layer.qkv) is kind for layer in session.model.layers)
    assert session.model.special_tokens == (0, 60)


def test_the_copy_in_full_precision_does_not_stay_behind_a_quantised_target():
    assert opened(weights="int4", execution="eager").model.nbytes < 0.6 * opened(execution="eager").model.nbytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int2"}, "weights are one of full, int8, int4, got 'int2'"),
        ({"execution": "fast"}, "execution is one of eager, native, cuda_graphs, got 'fast'"),
        ({"dtype": "int8"}, "dtype is one of bfloat16, float16, float32, got 'int8'"),
    ],
)
def test_other_words_are_refused_with_those_there_are(options, words):
    with pytest.raises(BadInput, match=words):
        opened(**options)


def test_cuda_graphs_on_a_cpu_are_refused():
    with pytest.raises(BadInput, match="cuda_graphs"):
        opened(execution="cuda_graphs")


def test_rope_theta_and_the_longest_context_reach_the_model_and_are_remembered():
    session = opened(rope_theta=2e5, max_context_len=9000)
    assert (session.model.spec.rope_theta, session.model.spec.max_context_len) == (2e5, 9000)
    assert (session.rope_theta, session.max_context_len) == (2e5, 9000)
    assert (opened().rope_theta, opened().max_context_len) == (None, None)


def test_a_text_must_fit_the_model_and_its_drafter_and_the_refusal_says_which():
    session, drafter = opened(execution="eager"), DrafterSpec(kind="draft_model", path="small")
    longest = session.model.spec.max_context_len
    session.model.beside["small", None] = tiny_model(max_context_len=100)
    check_length(session, [], longest - 10, 10)
    check_length(session, [drafter], 90, 10)
    with pytest.raises(BadInput, match=f"the {longest} tokens of the model, got {longest} . 10; .* --max-context"):
        check_length(session, [], longest, 10)
    with pytest.raises(BadInput, match=rf"the 100 tokens of small, got 91 \+ 10; .* another draft model \(the target has {longest}\)"):
        check_length(session, [drafter], 91, 10)


@pytest.mark.parametrize("verb", ["profile", "sweep", "generate"])
def test_the_flags_of_every_command_that_runs_a_model_reach_it(verb, monkeypatch, tmp_path):
    seen = []

    def called(*values, **options):
        seen.append((options["rope_theta"], options["max_context_len"]))
        raise BadInput("far enough")

    monkeypatch.setattr(planner, verb, called, raising=False)
    words = ["--prompt", "x"] if verb == "generate" else ["--dataset", "x.txt", "-o", str(tmp_path / "out.json")]
    for flags in ([], ["--rope-theta", "2.05e5", "--max-context", "16384"]):
        monkeypatch.setattr(sys, "argv", ["planner", verb, *words, "--quiet", *flags])
        with pytest.raises(SystemExit):
            main()
    assert seen == [(None, None), (2.05e5, 16384)]


@pytest.mark.parametrize("given", [{}, {"rope_theta": 2.05e5, "max_context_len": 16384}], ids=str)
def test_a_plan_is_checked_on_the_model_that_was_profiled(given, monkeypatch, tmp_path):
    save_profile(made_profile(**given), tmp_path / "profile.json")
    save_plan(planner.plan(tmp_path / "profile.json", context_len=1024), tmp_path / "plan.json")
    seen = []

    def opening(model, **options):
        seen.append({name: options[name] for name in ("rope_theta", "max_context_len") if options[name] is not None})
        raise BadInput("far enough")

    monkeypatch.setattr("planner.commands.check.open_session", opening)
    with pytest.raises(BadInput, match="far enough"):
        planner.check(tmp_path / "plan.json", ["x.txt"])
    assert seen == [given]


# ---- drafters with a checkpoint of their own


def draft_model(path="small", **changes):
    return DrafterSpec(kind="draft_model", path=path, **changes)


def test_each_checkpoint_is_loaded_once_in_its_own_dtype():
    session = opened(execution="eager")
    drafters = [DrafterSpec(kind="ngram"), draft_model(), draft_model(weights="int8"), draft_model(dtype="float32")]
    load_drafters(session, drafters)
    before = dict(session.model.beside)
    load_drafters(session, drafters[1:2])
    assert session.model.beside == before and {key: model.dtype for key, model in before.items()} == {
        ("small", None): torch.bfloat16, ("small", "float32"): torch.float32,
    }  # fmt: skip
    full, int8, wide = drafter_models(session, drafters)
    assert (full.dtype, int8.dtype, wide.dtype) == ("bfloat16", "bfloat16", "float32")
    assert int8.weights_bytes < 0.7 * full.weights_bytes and wide.weights_bytes == 2 * full.weights_bytes
    assert int8.fingerprint == f"{full.fingerprint}-int8"
    assert weights_bytes(session) > session.model.nbytes + full.weights_bytes + wide.weights_bytes


@pytest.mark.parametrize("variant", [{"weights": "int8"}, {"weights": "int8", "vocab": 20}], ids=str)
def test_a_cheaper_draft_model_alone_leaves_no_copy_in_full_precision_behind(variant):
    session = opened(execution="eager")
    for _ in range(2):
        load_drafters(session, [draft_model(**variant)])
        [int8] = drafter_models(session, [draft_model(**variant)])
        assert weights_bytes(session) == session.model.nbytes + int8.weights_bytes and int8.fingerprint.endswith("0-int8")
    load_drafters(session, [draft_model()])  # and where somebody wants it in full after all, it is loaded again
    [full] = drafter_models(session, [draft_model()])
    assert weights_bytes(session) == session.model.nbytes + full.weights_bytes and full.weights_bytes > int8.weights_bytes


def test_a_draft_model_that_knows_fewer_tokens_knows_the_special_ones():
    session = opened(execution="eager")
    load_drafters(session, [draft_model(), draft_model(vocab=20)])
    [full, few] = drafter_models(session, [draft_model(), draft_model(vocab=20)])
    C = session.model.spec.hidden_size  # its embedding is its head, which is cut for the few and stays to be read
    assert few.weights_bytes - full.weights_bytes == 20 * (2 * C + 8)
    assert few.fingerprint == full.fingerprint
    with pytest.raises(BadInput, match="more than the 2 special tokens and fewer than all 61, got 61"):
        load_drafters(session, [draft_model("other", vocab=61)])


def test_a_draft_model_of_another_vocabulary_is_refused():
    with pytest.raises(BadInput, match="needs the target's vocabulary, foreign has 'b' as 2 and the target as 1; take a smaller model"):
        load_drafters(opened(execution="eager"), [draft_model("foreign")])


def test_a_draft_model_that_changed_since_the_profile_is_refused():
    session = opened(execution="eager")
    load_drafters(session, [draft_model()])
    found = drafter_models(session, [draft_model()])
    check_drafters(session, found)
    with pytest.raises(BadInput, match="small was 1111.*this one is 0000"):
        check_drafters(session, [msgspec.structs.replace(found[0], fingerprint="1" * 16)])
