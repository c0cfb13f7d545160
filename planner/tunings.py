"""A Tuning: what a user's own engine was measured to do, what to set at each load, and how that held on prompts not used. Plain JSON.

Times are seconds, sizes bytes. Intervals hold at 90 %.
"""

from typing import Literal

from planner.canaries import Answer
from planner.exports import Step
from planner.measurements import Name, Natural
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.schedules import Setting
from planner.serving import OFF
from planner.specs import Count, DraftLen, Objective, Spec


class Counted(Spec, kw_only=True):
    """What an engine counted while a load ran against it."""

    tokens: Real  # generated, first tokens of requests left out
    drafts: Real = 0.0  # rounds that drafted
    drafted: Real = 0.0  # tokens
    accepted: Real = 0.0
    survived: list[Real] = []  # [i] rounds in which draft i was accepted; empty where the engine does not say

    @property
    def rounds(self) -> float:
        """Of all requests, those that drafted nothing among them: each leaves one token beside those accepted."""
        return self.tokens - self.accepted


class Pool(Spec, kw_only=True):
    """Room for keys and values, as the server said when it started, beside what was computed for it."""

    tokens: Natural | None = None
    bytes: Natural | None = None
    expected_tokens: Natural | None = None  # None: not enough is known of the model or the device
    expected_bytes: Natural | None = None


class Launch(Spec, kw_only=True):
    """One start of the server, or one server that was there."""

    drafter: Name = OFF
    steps: list[Step] = []  # by running batch; empty for a server that was there
    command: list[str] = []  # without keys
    version: Name = ""  # of the engine, as its log says; empty where it does not
    ready_s: Real = 0.0  # from its start until it answered
    pool: Pool | None = None
    difference: Sentence = ""  # of the pool from what was expected, where it is worth saying
    warnings: list[Sentence] = []  # of the engine's own, that say a setting is not in force


class Run(Spec, kw_only=True):
    """One load against one launch: requests of which `concurrency` are in the system all the time."""

    launch: Natural  # place among the launches
    stage: Literal["measure", "check"] = "measure"
    repeat: Natural = 0  # which start of this setting
    setting: Setting  # as the server was told for this load
    concurrency: Count
    answers: list[Answer]
    wall_s: Real
    sent: Count  # requests, those that only kept the load up among them
    degenerate: Natural = 0  # answers that repeat themselves, left out
    short: Natural = 0  # answers of fewer than 2 tokens, left out
    counted: Counted | None = None  # None: the engine counts nothing
    prompts: list[Natural] = []  # [i] place, among the load's prompts, of the one that answers[i] answers

    @property
    def tpot_s(self) -> float:
        """Mean over tokens."""
        return sum(answer.decode_s for answer in self.answers) / sum(answer.output_tokens - 1 for answer in self.answers)

    @property
    def output_tokens_per_s(self) -> float:
        """Of all requests together, by Little's law: how the load begins and ends does not count, since it is kept up all the time."""
        whole_s = sum(answer.ttft_s + answer.decode_s for answer in self.answers)
        return self.concurrency * sum(answer.output_tokens for answer in self.answers) / whole_s


class Defect(Spec, kw_only=True):
    """What the engine does otherwise than it was told, or than it should."""

    name: Literal["draft_len ignored", "idle drafter", "collapse", "never accepted", "starved", "warned"]
    what: Sentence  # with figures
    known_as: Sentence = ""  # an issue or pull request of the engine, where it is known
    remedy: Sentence = ""


class TunedLoad(Spec, kw_only=True):
    """What is set at one load, as predicted."""

    concurrency: Count
    setting: Setting
    running_batch: Real  # requests that decode at once
    tpot_s: Interval
    output_tokens_per_s: Interval  # of all requests together
    gain_over_off: Interval  # in the objective, relatively
    gain_over_yours: Interval | None  # None: what the given command says was not measured
    next_best: Setting | None  # of the others, at this load; None where there is none
    gain_over_next: Interval | None  # may be below 0 where one setting holds at all loads
    best: Setting  # at this load alone; another than `setting` where an engine keeps one for all loads, or a change would win almost nothing


class CheckedLoad(Spec, kw_only=True):
    """A setting at a load, on prompts that were not used before: what was predicted and what was measured."""

    setting: Setting
    role: Literal["chosen", "off", "yours"]
    concurrency: Count
    num_answers: Count
    predicted_tpot_s: Interval | None  # None: a setting of yours that was not measured before
    predicted_output_tokens_per_s: Interval | None
    measured_tpot_s: Interval
    measured_output_tokens_per_s: Interval
    gain: Interval | None = None  # of what was chosen over this, in the objective, relatively, prompt by prompt; None for the choice itself


class Tuning(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["tuning"] = "tuning"
    planner_version: Name
    engine: Name
    engine_version: Name  # empty: the engine does not say
    method: Name
    draft_model: Name | None
    model: Name
    system: Name
    objective: Objective
    context_len: Count  # prompt tokens, mean
    output_len: Count  # asked for
    temperature: Real
    seed: int
    minutes: Real
    requests: Natural
    launches: list[Launch]
    runs: list[Run]
    profile: Name  # file names inside the folder
    schedule: Name
    chosen: list[Step]  # what the server is told, by running batch; none: off
    loads: list[TunedLoad]
    yours: Setting | None  # what the given command says
    predicted_gain: Interval | None  # of the choice over yours, over all loads, relatively; None without yours
    paste: str  # what to add to the command, as shell words; empty: nothing
    checked: list[CheckedLoad]
    max_draft_len: DraftLen
    defects: list[Defect] = []
    cut: list[Sentence] = []  # what a bound left unmeasured
    notes: list[Sentence] = []
