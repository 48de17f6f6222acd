"""The JSON of the service: what a request may hold, and what an answer holds. The answers' models describe
them for /docs and for tests; what is sent is what the Recommender answered."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

MAX_HISTORY, MAX_CANDIDATES, MAX_QUERY_WORDS, MAX_QUERY_CHARS, MAX_ID_CHARS = 2000, 2000, 256, 2000, 256


def _needs(needs: str) -> WrapValidator:
    """For a field of several types: one error that says what the field needs, instead of one for each type
    that was tried. JSON's true is none of them, though pydantic reads it as 1."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, bool):
            raise ValueError(needs)
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(needs) from error

    return WrapValidator(check)


ItemId = Annotated[
    int | Annotated[str, Field(max_length=MAX_ID_CHARS)],
    _needs(f"must be a whole number or text of at most {MAX_ID_CHARS} characters"),
]
Task = Literal["rec", "src"]
Query = Annotated[
    Annotated[str, Field(max_length=MAX_QUERY_CHARS)]
    | Annotated[list[int], Field(max_length=MAX_QUERY_WORDS)]
    | None,
    _needs(
        f"must be text of at most {MAX_QUERY_CHARS} characters, or a list of at most {MAX_QUERY_WORDS} word "
        "numbers"
    ),
]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


# ---- requests ----------------------------------------------------------------------------------------------


class Click(Strict):
    """One entry of a history."""

    item_id: ItemId
    task: Task = "rec"
    query: Query = None


class Ask(Strict):
    """A request. trainer/serving/recommend.py has the meaning of each field. user_id: instead of a history;
    where both are given, history counts, and an empty one is refused. system: one of those of /model to
    compare with; empty: the model."""

    user_id: ItemId | None = None
    history: Annotated[list[Click], Field(max_length=MAX_HISTORY)] | None = None
    query: Query = None
    candidates: Annotated[list[ItemId], Field(max_length=MAX_CANDIDATES)] | None = None
    k: int | None = None
    num_candidates: int | None = None
    include_seen: bool = False
    explain: bool = False
    with_text: bool = False
    system: Annotated[str, Field(max_length=MAX_ID_CHARS)] = ""


class AskScores(Ask):
    """A request for the scores of given candidates."""

    task: Task
    candidates: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES)]


# ---- answers -----------------------------------------------------------------------------------------------


class Weight(BaseModel):
    """How much one history item counts, a number for each view of the model (GenSR: cf, semantic)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    item_id: int | str


class Item(Strict):
    """text: with_text was asked. weights: explain was asked; the newest history items that the model
    reads."""

    item_id: int | str
    score: float
    text: str = ""
    weights: list[Weight] = []


class Answer(Strict):
    """items: best first. scores: P("Yes") of the candidates in the order given, or of `items`."""

    items: list[Item]
    scores: list[float]
    model: dict[str, Any]


class Error(Strict):
    """Every status of 400 and above."""

    error: str


class Health(Strict):
    """The process lives. model: what answers, by name and version, or by run. problem: why a newer version
    does not; "" where there is none."""

    status: Literal["ok"] = "ok"
    model: dict[str, Any]
    problem: str


class Ready(Strict):
    """Whether requests are taken, and how many wait."""

    ready: bool
    waiting: int


class SystemFacts(Strict):
    """A system that a request may name. explains: its answers can have weights. knows_users: a request may
    name a user instead of a history."""

    name: str
    title: str
    tasks: list[Task]
    explains: bool
    knows_users: bool


class Facts(Strict):
    """What answers, and its limits. systems: the model, named "", and those to compare it with. queries: how
    they are written: natural, words, digits or drop."""

    model: dict[str, Any]
    systems: list[SystemFacts]
    num_items: int
    queries: str
    limits: dict[str, int | float]


class KnownUsers(Strict):
    """reason: why there are none."""

    users: list[int | str]
    reason: str


class ExampleQueries(Strict):
    """Queries of the training data, the most frequent first. reason: why there are none."""

    queries: list[str]
    reason: str


class HistoryItem(Strict):
    """One click, with the text of its item, and the query of a search."""

    item_id: int | str
    task: Task
    text: str
    query: str = ""


class History(Strict):
    """A user's clicks, oldest first."""

    user_id: str
    history: list[HistoryItem]
