"""`gensr promote NAME`: the gate to the alias `champion`. Candidate and champion are compared on the same
stored test events and candidates (sampled ones unless asked otherwise), by a paired bootstrap over users for
each task (evaluation/paired.py).

The candidate becomes champion when no task falls by more than the margin (the whole 95 % interval of the
difference lies above −margin) and at least one task gains (the whole interval lies above 0). A segment margin
also refuses a candidate of which a segment surely falls by more than it: the whole interval lies below
−segment margin. (Segments are small: the rule for tasks would refuse nearly everything.) Without a champion
the candidate becomes the first; a version that was rolled back does not come again. The decision and its
figures are tags of the candidate's version.

A candidate of newer data ranked other events than the champion did. Then a run stands for the champion
(against): its weights on the candidate's prepared folder, without a step of training. gain=False lets through
what gains nothing: the newer data may be reason enough.
"""

import json
import math
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from data_shards.checksum import file_sha256
from data_shards.schema import TASKS
from trainer.errors import RunError
from trainer.evaluation.paired import StoredRanks, check_same, paired, paired_segments, read_stored
from trainer.evaluation.summary import check_candidates, evaluation_name
from trainer.registry.store import ALIAS, default_uri, fetched, find_version, mlflow_errors, parts_of
from trainer.runs.retriever_facts import RETRIEVER, retriever_of, retriever_words
from trainer.runs.run_folder import RunFolder
from trainer.runs.sealed import check_sealed
from trainer.runs.weights import WEIGHTS, read_model_document
from trainer.tracking.store import connect, must_exist

CHAMPION = "champion"
# tag of a champion: the version that was champion before, for rollback
PREVIOUS = "promote.previous_champion"
ROLLED_BACK = "rolled back"
METRIC = "ndcg@10"
VERDICT = "promote.decision"  # tag: promoted, refused or rolled back
FIGURES = ("champion", "candidate", "difference", "ci95")  # of a task, among the tags
# two runs of one configuration differ by ± 0.007 on 8,000 events: equals pass, a loss that users could notice
# does not
MARGIN = 0.01


@dataclass(frozen=True)
class Decision:
    """What promote found, and did unless it was a dry run."""

    name: str
    candidate: int
    champion: int | None  # before
    promoted: bool  # or would be, in a dry run
    reason: str
    # {"rec": {"a": champion, "b": candidate, "difference", "ci95", …}, "src": …}
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    # {"rec": {"history_length": {"1–4": as above, …}, …}, …}, where a segment margin is given
    segments: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    candidates: str = "sampled"  # of the evaluations that were compared
    # {"champion": words, "candidate": words} of those that were evaluated with a retriever
    retrievers: dict[str, str] = field(default_factory=dict)
    against: str = ""  # the run that stood for the champion

    def lines(self, dry_run: bool = False) -> list[str]:
        rows = [
            f"  {task}  {METRIC}, {self.candidates}  champion {f['a']:.4f}  candidate {f['b']:.4f}  "
            f"difference {f['difference']:+.4f} "
            f"[{f['ci95'][0]:+.4f}, {f['ci95'][1]:+.4f}]  {f['num_events']:,} events"
            for task, f in self.figures.items()
        ]
        against = (
            f"champion is version {self.champion}" if self.champion is not None else "there is no champion"
        )
        be = "would be " if dry_run else ""
        return [
            f"{self.name}: candidate is version {self.candidate}, {against}",
            *([f"  champion: its weights on the candidate's data, {self.against}"] if self.against else []),
            *(f"  {role}: with the retriever {words}" for role, words in self.retrievers.items()),
            *rows,
            f"{be}{'promoted' if self.promoted else 'not promoted'}: {self.reason}",
        ]


@dataclass(frozen=True)
class Gate:
    """What a candidate has to pass."""

    margin: float
    segment_margin: float | None
    candidates: str
    gain: bool
    against: str

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise RunError(f"--margin must be 0 or more, got {self.margin}")
        if self.segment_margin is not None and not self.segment_margin >= 0:
            raise RunError(f"--segment-margin must be 0 or more, got {self.segment_margin}")

    def tags(self) -> dict[str, str]:
        return {
            "promote.margin": f"{self.margin:g}",
            "promote.metric": f"{METRIC}, {self.candidates}",
            "promote.gain": "asked" if self.gain else "not asked",
            "promote.against": self.against or "its own evaluation",
            **({} if self.segment_margin is None else {"promote.segment_margin": f"{self.segment_margin:g}"}),
        }


def promote(
    name: str,
    uri: str = "",
    margin: float = MARGIN,
    dry_run: bool = False,
    segment_margin: float | None = None,
    candidates: str = "sampled",
    gain: bool = True,
    against: str | Path = "",
    version: int = 0,
) -> Decision:
    """Compare the versions that the aliases candidate and champion name; move champion if the rule above says
    so, and tag the candidate either way.

    margin, segment_margin: NDCG@10, ≥ 0; segment_margin=None asks for no segment. dry_run: changes nothing.
    candidates: which test evaluation decides, sampled, hard or full. gain: whether a task has to gain.
    against: an evaluated run of the champion's weights (run.init_from, run.max_epochs=0), whose ranks count
    as the champion's. version: of the candidate, where no other will do. Raises ConfigError for another kind
    of candidates, RunError when there is no candidate, a version holds no such evaluation, the two were not
    evaluated on the same events and candidates, `against` is another model, or champion has moved meanwhile.
    """
    check_candidates(candidates)
    gate = Gate(margin, segment_margin, candidates, gain, str(against))
    uri = must_exist(uri or default_uri())
    client = connect(uri)
    with mlflow_errors(f"MLflow at {uri} does not compare the versions of {name}"):
        candidate, champion = (find_version(client, name, alias) for alias in (ALIAS, CHAMPION))
        if candidate is None:
            raise RunError(
                f"{name} has no version with the alias {ALIAS} at {uri}. Make one with: gensr register RUN "
                f"{name}"
            )
        number, before = int(candidate.version), int(champion.version) if champion is not None else None
        if version and number != version:
            raise RunError(
                f"{name}: version {number} was registered meanwhile and is its candidate now, not version "
                f"{version}. Nothing was changed. Give the alias back: register the run of version {version} "
                "again"
            )
        if reason := _settled(number, before, candidate):
            return Decision(name, number, before, promoted=False, reason=reason, candidates=candidates)
        decision = _decide(name, number, before, uri, gate)
        if not dry_run:
            _check_champion(client, name, champion)
            _apply(client, decision, gate)
    return decision


def _settled(number: int, champion: int | None, candidate: Any) -> str:
    """Why a candidate need not be compared; "" where it has to be."""
    if number == champion:
        return f"version {number} is the champion already"
    if candidate.tags.get(VERDICT) == ROLLED_BACK:
        return f"version {number} was rolled back; to try it again, register its run again"
    return ""


def _apply(client: Any, decision: Decision, gate: Gate) -> None:
    """Tags the candidate, and moves champion where it was promoted."""
    tags = {**gate.tags(), **decision_tags(decision)}
    if decision.promoted and decision.champion is not None:
        tags[PREVIOUS] = str(decision.champion)
    # the verdict after what it is made of
    tags[VERDICT] = "promoted" if decision.promoted else "refused"
    for key, value in tags.items():
        client.set_model_version_tag(decision.name, str(decision.candidate), key, value)
    if decision.promoted:  # last: who reads the alias finds the tags
        client.set_registered_model_alias(decision.name, CHAMPION, str(decision.candidate))


def rollback(name: str, uri: str = "", dry_run: bool = False) -> tuple[int, int]:
    """Give champion back to the version that had it before the present one. → (version it leaves, version it
    goes to). Raises RunError when there is none."""
    uri = must_exist(uri or default_uri())
    client = connect(uri)
    with mlflow_errors(f"MLflow at {uri} does not roll {name} back"):
        champion = find_version(client, name, CHAMPION)
        if champion is None:
            raise RunError(f"{name} has no champion at {uri}: there is nothing to roll back")
        previous = champion.tags.get(PREVIOUS, "")
        if not previous:
            raise RunError(
                f"{name}: version {champion.version} is the first champion, there is none before it"
            )
        if not dry_run:
            client.get_model_version(name, previous)  # raises when it has been deleted
            _check_champion(client, name, champion)
            client.set_model_version_tag(name, str(champion.version), VERDICT, ROLLED_BACK)
            client.set_model_version_tag(name, str(champion.version), "promote.decided_at", _now())
            client.set_registered_model_alias(name, CHAMPION, previous)
    return int(champion.version), int(previous)


def _check_champion(client: Any, name: str, expected: Any) -> None:
    """Before the alias moves: raises RunError where somebody else has moved it since it was read."""
    now = find_version(client, name, CHAMPION)
    before, after = (version and version.version for version in (expected, now))
    if after != before:
        standing = f"version {after}" if now is not None else "no version"
        raise RunError(f"{name}: champion has become {standing} meanwhile. Nothing was changed: run it again")


def _decide(name: str, candidate: int, champion: int | None, uri: str, gate: Gate) -> Decision:
    after = _ranks_of(name, candidate, uri, gate.candidates)
    if champion is None:  # a champion must be comparable to those after it, so its ranks were read
        return Decision(
            name,
            candidate,
            champion=None,
            promoted=True,
            reason="first champion",
            candidates=gate.candidates,
            retrievers=_retrievers(candidate=after),
        )
    if gate.against:
        before = _stand_in(Path(gate.against), name, champion, uri, gate.candidates)
    else:
        before = _ranks_of(name, champion, uri, gate.candidates)
    check_same(before, after)
    figures = {task: of_task[METRIC] for task, of_task in paired(before, after).items()}
    promoted, reason = judge(figures, gate.margin, gate.gain)
    segments = {}
    if gate.segment_margin is not None:
        segments = paired_segments(before, after)
        if promoted and (fallen := fallen_segments(segments, gate.segment_margin)):
            promoted, reason = False, f"{'; '.join(fallen)} falls by more than {gate.segment_margin:g}"
    return Decision(
        name,
        candidate,
        champion=champion,
        promoted=promoted,
        reason=reason,
        figures=figures,
        segments=segments,
        candidates=gate.candidates,
        retrievers=_retrievers(champion=before, candidate=after),
        against=gate.against,
    )


def _ranks_of(name: str, number: int, uri: str, candidates: str) -> StoredRanks:
    where, artifacts = f"version {number} of {name}", f"models:/{name}/{number}/artifacts"
    if "evaluation" not in parts_of(artifacts, uri):
        raise _lacking(where, candidates)
    with fetched(f"{artifacts}/evaluation", uri) as folder:  # not the weights beside it
        return read_ranks(folder, where, candidates)


def _stand_in(run: Path, name: str, number: int, uri: str, candidates: str) -> StoredRanks:
    """The ranks of a run without a step that is the champion's version on newer data. Raises RunError for
    another model, or other weights."""
    stored = read_stored(run, evaluation_name("test", candidates), str(run))
    with fetched(f"models:/{name}/{number}/artifacts/model", uri) as model:
        weights, theirs = file_sha256(model / WEIGHTS), read_model_document(model)
    ours = read_model_document(RunFolder(run).model)
    other = [key for key in ("name", "settings", "data", "precision") if _differs(theirs[key], ours[key])]
    if stored.protocol.get("begun_with") != weights or other:
        what = (
            f"has another {' and another '.join(other)} than"
            if other
            else "was not evaluated with the weights of"
        )
        raise RunError(
            f"{run} {what} version {number} of {name}, the champion. Make a run of it on the candidate's "
            "prepared folder, and evaluate that: gensr train CHAMPION_RUN/config.yaml data.dir=OUT "
            "run.dir=RUN run.init_from=CHAMPION_RUN run.max_epochs=0 run.max_steps=0"
        )
    return stored


def _differs(theirs: Any, ours: Any) -> bool:
    """What an older model does not say is not compared."""
    if isinstance(theirs, dict):
        return any(ours.get(key) != value for key, value in theirs.items())
    return bool(theirs != ours)


def _retrievers(**evaluations: StoredRanks) -> dict[str, str]:
    """By role, of the evaluations that had one."""
    words = {role: retriever_words(retriever_of(stored.protocol)) for role, stored in evaluations.items()}
    return {role: text for role, text in words.items() if text}


def judge(figures: dict[str, dict[str, Any]], margin: float, gain: bool = True) -> tuple[bool, str]:
    """{task: {"difference", "ci95": [low, high]}} of candidate − champion → whether to promote, and why or
    why not. gain: whether a task has to."""
    unknown = [
        task
        for task, f in figures.items()
        if f.get("num_users", 2) < 2 or not all(map(math.isfinite, f["ci95"]))  # one user: no spread
    ]
    if unknown or not figures:
        return False, f"no interval for {' and '.join(unknown) or 'any task'}: there is too little to compare"
    fallen = [task for task, f in figures.items() if f["ci95"][0] < -margin]
    gained = [task for task, f in figures.items() if f["ci95"][0] > 0]
    if fallen:
        return False, f"{' and '.join(fallen)} may fall by more than the margin of {margin:g}"
    held = f"no task falls by more than the margin of {margin:g}"
    if not gained:
        return (False, "no task gains beyond what chance explains") if gain else (True, held)
    return True, f"{' and '.join(gained)} gains, {held}"


def fallen_segments(segments: dict[str, dict[str, dict[str, Any]]], margin: float) -> list[str]:
    """Those of paired_segments() whose whole interval lies below −margin, as "src query ambiguity 0"."""
    return [
        f"{task} {name.replace('_', ' ')} {bucket}"
        for task, names in segments.items()
        for name, buckets in names.items()
        for bucket, f in buckets.items()
        if f["num_users"] > 1 and f["ci95"][1] < -margin
    ]


def read_ranks(folder: Path, where: str, candidates: str = "sampled") -> StoredRanks:
    """Of a version's artifacts/evaluation. Raises RunError when it has none of that kind."""
    name = evaluation_name("test", candidates)
    if not RunFolder(folder).is_evaluated(name):
        raise _lacking(where, candidates)
    check_sealed(folder)
    return read_stored(folder, name, where)


def _lacking(where: str, candidates: str) -> RunError:
    sampled = candidates == "sampled"
    what = "no evaluation" if sampled else f"no {candidates} evaluation"
    option = "" if sampled else f" --candidates {candidates}"
    return RunError(
        f"{where} holds {what}. Run gensr evaluate RUN{option}, then gensr register RUN NAME again"
    )


def decision_tags(decision: Decision) -> dict[str, str]:
    tags = {
        "promote.reason": decision.reason,
        "promote.champion": str(decision.champion or "none"),
        "promote.decided_at": _now(),
    }
    tags |= {f"promote.{role}.{RETRIEVER}": words for role, words in decision.retrievers.items()}
    for task, f in decision.figures.items():
        tags |= {
            f"promote.{task}.difference": f"{f['difference']:.6g}",
            f"promote.{task}.ci95": f"[{f['ci95'][0]:.6g}, {f['ci95'][1]:.6g}]",
        }
        tags |= {f"promote.{task}.champion": f"{f['a']:.6g}", f"promote.{task}.candidate": f"{f['b']:.6g}"}
    return tags


def decided(name: str, version: int, uri: str) -> dict[str, Any]:
    """What promote() has decided of a version, from its tags: {"decision", "reason", "champion": before,
    "figures": {task: {"champion", "candidate", "difference", "ci95"}}}; {} where it has not, or was stopped
    before the alias moved."""
    with mlflow_errors(f"MLflow at {uri} does not say what was decided of version {version} of {name}"):
        client = connect(uri)
        tags = client.get_model_version(name, str(version)).tags
        champion = find_version(client, name, CHAMPION)
    before = tags.get("promote.champion", "")
    standing = str(champion.version) if champion is not None else "none"
    if VERDICT not in tags or (tags[VERDICT] == "promoted" and standing == before):
        return {}
    figures = {
        task: {key: json.loads(tags[f"promote.{task}.{key}"]) for key in FIGURES}
        for task in TASKS
        if f"promote.{task}.difference" in tags
    }
    return {
        "decision": tags[VERDICT],
        "reason": tags.get("promote.reason", ""),
        "champion": before,
        "figures": figures,
    }


def in_use(name: str, uri: str) -> set[int]:
    """The versions with an alias, whoever gave it, and the one that a rollback would bring."""
    with mlflow_errors(f"MLflow at {uri} does not say which versions of {name} have an alias"):
        client = connect(uri)
        versions = set(client.get_registered_model(name).aliases.values())
        champion = find_version(client, name, CHAMPION)
    if champion is not None:
        versions.add(champion.tags.get(PREVIOUS))
    return {int(version) for version in versions if version}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
