"""Verbs about models: register, promote, score, recommend, search, serve, ui."""

import dataclasses
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.cli.base import AsJson, Retriever, answer, next_steps, note, say, stage_lines, verb
from trainer.errors import ConfigError, RequestError
from trainer.runtime.progress import waiting_for

Model = Annotated[str, typer.Argument(help="run folder, or models:/NAME@alias")]
Registry = Annotated[
    str, typer.Option(help="MLflow registry; default: MLFLOW_TRACKING_URI, else runs/mlflow.db")
]


@verb("gensr register runs/mine gensr-mine")
def register(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    name: Annotated[str, typer.Argument(help="registered model")],
    alias: Annotated[str, typer.Option(help="alias that moves to the new version")] = "candidate",
    retriever: Retriever = None,
    as_json: AsJson = False,
) -> None:
    """Make a version of a registered model from a run, self-contained and checked."""
    stage_lines()
    waiting_for("loading PyTorch, MLflow and the model")
    from trainer.registry.store import registry_of, uri_option
    from trainer.registry.versions import register as run

    version = run(run_dir, name, alias, notify=note, retriever=retriever)
    model, option = shlex.quote(f"models:/{name}@{alias}"), uri_option(registry_of(run_dir))
    answer(
        {"name": name, "version": version, "alias": alias},
        as_json,
        f"registered models:/{name}/{version}, also models:/{name}@{alias}",
        *next_steps(
            f"gensr recommend {model} --user ID{option}",
            f"gensr promote {shlex.quote(name)}{option}" if alias == "candidate" else "",
            f"gensr serve {model}{option}",
        ),
    )


@verb("gensr promote gensr-mine --dry-run")
def promote(
    name: Annotated[str, typer.Argument(help="registered model")],
    margin: Annotated[
        float, typer.Option(help="NDCG@10 that no task may lose, at the low end of its 95 % interval")
    ] = 0.01,
    segment_margin: Annotated[
        float | None,
        typer.Option(
            help="NDCG@10 that no segment may lose, at the high end of its 95 % interval; default: not asked"
        ),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="which test evaluation of the versions decides: sampled, hard or full")
    ] = "sampled",
    gain: Annotated[
        bool, typer.Option(help="whether a task has to gain; without, it is enough that none falls")
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="evaluated run of the champion's weights on the candidate's data, where that is newer "
            "(docs/continue.md)",
        ),
    ] = None,
    back: Annotated[
        bool, typer.Option("--rollback", help="give the alias back to the champion before; compares nothing")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, change nothing")
    ] = False,
    uri: Registry = "",
    as_json: AsJson = False,
) -> None:
    """Move the alias champion to the candidate if, on the same test events, one task gains and none falls by
    more than a margin.

    The decision and its figures become tags of the candidate's version. Exit code 0 also when it is refused:
    read "promoted".
    """
    from trainer.registry.promote import promote as run
    from trainer.registry.promote import rollback

    if back:
        left, now = rollback(name, uri, dry_run)
        line = (
            f"{name}: champion {'would go' if dry_run else 'went'} back from version {left} to version {now}"
        )
        answer({"name": name, "from": left, "champion": now, "dry_run": dry_run}, as_json, line)
        return
    decision = run(name, uri, margin, dry_run, segment_margin, candidates, gain, against or "")
    dry_line = ["dry run: nothing was changed"] if dry_run else []
    champion, option = shlex.quote(f"models:/{name}@champion"), f" --uri {shlex.quote(uri)}" if uri else ""
    after = next_steps(f"gensr serve {champion}{option}")
    lines = [*decision.lines(dry_run), *dry_line, *(after if decision.promoted and not dry_run else [])]
    answer({**dataclasses.asdict(decision), "dry_run": dry_run}, as_json, *lines)


@verb("gensr score models:/gensr-demo@candidate requests.jsonl")
def score(
    model: Model,
    requests: Annotated[
        Path,
        typer.Argument(
            help=".jsonl or .parquet: history, task, query, candidates; "
            "without candidates the whole catalogue"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="new .jsonl or .parquet file; default: the lines of a .jsonl on stdout"),
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="only part I of N of the requests: for several jobs")
    ] = "1/1",
    keep_going: Annotated[
        bool, typer.Option(help="a bad request becomes an error in its row instead of ending the job")
    ] = False,
    retriever: Retriever = None,
    uri: Registry = "",
) -> None:
    """Score given candidates from histories, one request or millions."""
    from trainer.serving.score_file import answer_lines, count_requests, part_of, score_file

    try:
        number, of = (int(text) for text in part.split("/"))
    except ValueError:
        raise ConfigError(f"--part must be I/N, got {part}") from None
    # says what is wrong with the file or the part before a model is loaded
    part_of(count_requests(requests), (number, of))
    progress = stage_lines()
    waiting_for("loading PyTorch and the model")
    from trainer.registry.store import open_model

    recommender = open_model(model, uri, notify=note, retriever=retriever)
    if out is None:
        for line in answer_lines(recommender, requests, (number, of), keep_going):
            say(line)
        return
    answered = score_file(
        recommender,
        requests,
        out,
        (number, of),
        keep_going,
        progress=lambda done, total: progress("score", done, total),
    )
    say(f"wrote {out}: {answered:,} requests")


User = Annotated[
    str,
    typer.Option("--user", help="user id: the history is all of the user's clicks in the prepared folder"),
]
History = Annotated[
    Path | None,
    typer.Option(
        "--history",
        help='JSON file: [{"item_id": …, "task": "rec"}, …] oldest first, or one such object a line',
    ),
]
HowMany = Annotated[int, typer.Option("-k", help="items to answer")]
Candidates = Annotated[int, typer.Option("--candidates", help="items that retrieval hands to the ranking")]
Seen = Annotated[bool, typer.Option("--seen", help="also answer items of the history")]
Prepared = Annotated[
    str,
    typer.Option(
        "--data", help="prepared folder for users by id; default: where the model says it was trained from"
    ),
]


@verb("gensr recommend runs/mine --user u17 -k 10")
def recommend(
    model: Model,
    user: User = "",
    history: History = None,
    k: HowMany = 10,
    candidates: Candidates = 400,
    seen: Seen = False,
    retriever: Retriever = None,
    data: Prepared = "",
    uri: Registry = "",
    as_json: AsJson = False,
) -> None:
    """Find the best items of the whole catalogue for a user: candidates by vectors, then ranked by the
    model."""
    if not user and history is None:
        raise RequestError("whose recommendations? Give --user ID or --history FILE")
    request = {"task": "rec", "k": k, "num_candidates": candidates, "include_seen": seen}
    answer_request(model, request, user, history, data, uri, as_json, retriever)


@verb("gensr search runs/mine --query 'red lamp' --user u17")
def search(
    model: Model,
    query: Annotated[str, typer.Option(help="text; for anonymised data word numbers separated by spaces")],
    user: User = "",
    history: History = None,
    k: HowMany = 10,
    candidates: Candidates = 400,
    seen: Seen = False,
    retriever: Retriever = None,
    data: Prepared = "",
    uri: Registry = "",
    as_json: AsJson = False,
) -> None:
    """Find the best items of the whole catalogue for a query, and for a user if one is given."""
    if not query.strip():
        raise RequestError("--query is empty: give text, or word numbers for anonymised data")
    request = {"task": "src", "query": query, "k": k, "num_candidates": candidates, "include_seen": seen}
    answer_request(model, request, user, history, data, uri, as_json, retriever)


def answer_request(
    model: str,
    request: dict[str, Any],
    user: str,
    history: Path | None,
    data: str,
    uri: str,
    as_json: bool,
    retriever: str | None = None,
) -> None:
    """Complete a request for the whole catalogue by its history, and print the answer."""
    if user and history is not None:
        raise RequestError("--user and --history both say whose history it is: give one of them")
    stage_lines()
    waiting_for("loading PyTorch and the model")
    from trainer.registry.store import open_model
    from trainer.serving.users import read_history

    given = {"user_id": user} if user else {"history": read_history(history) if history is not None else []}
    recommender = open_model(model, uri, data, notify=note, retriever=retriever)
    document = recommender.recommend({**request, **given, "with_text": True})
    width = max((len(str(item["item_id"])) for item in document["items"]), default=0)
    lines = [
        f"{place:>4}  {item['item_id']!s:<{width}}  {item['score']:.4f}  {item['text'][:100]}"
        for place, item in enumerate(document["items"], start=1)
    ]
    answer(
        document,
        as_json,
        *(lines or ["nothing that the history does not hold already: --seen shows that, too"]),
    )


Host = Annotated[
    str, typer.Option(help="address to listen on; the default cannot be reached from other machines")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")]


MAX_FOLLOW_S = 86_400.0
Compare = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL", help="another run folder or models:/NAME@alias to compare with; may be repeated"
    ),
]


@verb("gensr serve models:/gensr-demo@candidate --port 8000")
def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="requests ranked together")] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="requests in the queue; more are refused with 503")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="seconds until a request is answered with 504")
    ] = 30.0,
    expose_users: Annotated[
        bool, typer.Option("--expose-users", help="show users' histories to other machines, too (see --host)")
    ] = False,
    docs: Annotated[bool, typer.Option("--docs", help="describe the service at /docs")] = False,
    access_log: Annotated[
        str, typer.Option(help="file that gets a JSON line for each request; - is stderr, '' none")
    ] = "-",
    compare: Compare = None,
    follow: Annotated[
        float,
        typer.Option(
            min=0,
            max=MAX_FOLLOW_S,
            metavar="SECONDS",
            help="look so often where the alias of MODEL points, and answer with that version from then on; "
            "0: never",
        ),
    ] = 0.0,
    retriever: Retriever = None,
    data: Prepared = "",
    uri: Registry = "",
) -> None:
    """Answer /recommend, /search and /score over HTTP, several requests at once; shows a page to look at,
    too."""
    limits = {"max_batch": max_batch, "max_waiting": max_waiting, "timeout_s": timeout}
    options = {"host": host, "expose_users": expose_users, "docs": docs}
    others: dict[str, Any] = {"compare": compare or (), "retriever": retriever, "follow_s": follow}
    serve_model(model, port, data, uri, limits, options, access_log, **others)


@verb("gensr ui runs/demo")
def ui(
    model: Model,
    port: Port = 8000,
    compare: Compare = None,
    retriever: Retriever = None,
    data: Prepared = "",
    uri: Registry = "",
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
) -> None:
    """Look at a model: a user's two histories, a query, ranked items, what explains them, and what other
    systems answer: popularity, item-kNN, BM25, or another model."""
    import webbrowser

    limits = {"timeout_s": 300.0}  # the first request to item-kNN or BM25 counts it
    open_page = webbrowser.open if browser else None
    others: dict[str, Any] = {"compare": compare or (), "with_counted": True, "retriever": retriever}
    serve_model(model, port, data, uri, limits, open_page=open_page, **others)


def serve_model(
    model: str,
    port: int,
    data: str,
    uri: str,
    limits: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    access_log: str = "",
    open_page: Callable[[str], Any] | None = None,
    compare: Sequence[str] = (),
    with_counted: bool = False,
    retriever: str | None = None,
    follow_s: float = 0.0,
) -> None:
    """Bind first: a port in use is noticed before a model is loaded. with_counted: popularity, item-kNN and
    BM25 can be compared with. follow_s: seconds between two looks at the alias of `model`; 0: never."""
    from trainer.serving.server import bind

    if follow_s and not re.fullmatch("models:/[^/]+@[^/@]+", model):
        raise ConfigError(f"--follow needs a model by its alias, such as models:/NAME@champion, got {model}")
    bound = bind((options or {}).get("host", "127.0.0.1"), port)
    stage_lines()
    waiting_for("loading PyTorch and the model")
    from trainer.registry.store import open_model
    from trainer.serving.app import Limits, Options, make_app, open_access_log, run
    from trainer.serving.systems import compared_systems

    shown = Options(**(options or {}), access_log=open_access_log(access_log))
    if shown.warning:
        note(shown.warning)
    taken_on = Limits(**(limits or {}))
    load = partial(open_model, model, uri, data, notify=note, retriever=retriever)

    def loaded() -> Any:
        """The application; nothing else here holds its model, which goes when a newer one takes its place."""
        recommender = load()
        models = [(name, open_model(name, uri, data, notify=note)) for name in compare]
        others = compared_systems(models, recommender.users if with_counted else None)
        follow = _follow(model, uri, follow_s, load) if follow_s else None
        return make_app(recommender, taken_on, shown, others, follow)

    url = f"http://{f'[{shown.host}]' if ':' in shown.host else shown.host}:{bound.getsockname()[1]}/"

    def is_up() -> None:
        note(f"serving {model} at {url} (Ctrl-C ends it)")
        if open_page is not None:
            # a browser in the terminal ends with its last page: the service has to answer meanwhile
            threading.Thread(target=open_page, args=(url,), daemon=True).start()

    run(loaded(), bound, taken_on, is_up)


def _follow(model: str, uri: str, every_s: float, load: Callable[[], Any]) -> Any:
    from trainer.registry.store import default_uri, number_of
    from trainer.serving.follow import Follow

    name, _, alias = model.removeprefix("models:/").rpartition("@")
    return Follow(model, every_s, partial(number_of, name, alias, uri or default_uri()), load)
