"""What is hidden in text that leaves the program, and what stays readable."""

import pickle

import pytest

from data_shards.secrets import mask_secrets, masked
from trainer.data.node_cache import reason, shown, url_of
from trainer.errors import DataError, RunError


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:secret@db/x", "postgresql://***@db/x"),
        ("https://me:p@ss@host/x?y=1 and http://a:b@c", "https://***@host/x?y=*** and http://***@c"),
        ("s3://bucket/x?X-Amz-Signature=abc&part=1", "s3://bucket/x?X-Amz-Signature=***&part=1"),
        (
            "https://h/c/{}?sv=2024&sig=aB%2F3&auth=zz&versionId=7#access_token=q",
            "https://h/c/{}?sv=***&sig=***&auth=***&versionId=7#access_token=***",
        ),
        ("https://h/x?TOKEN: cannot be read", "https://h/x?*** cannot be read"),
        ("retries exceeded with url: /api/2.0?k=abc (x)", "retries exceeded with url: /api/2.0?k=*** (x)"),
        ("pipe:curl -u me:pw https://h/{}\nnext line", "pipe:curl ***\nnext line"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("sqlite:////runs/x%3Fy/mlflow.db", "sqlite:////runs/x%3Fy/mlflow.db"),
        ("5 bytes (truncated?). optim.lr=1 & x=2", "5 bytes (truncated?). optim.lr=1 & x=2"),
        ("file a?b is me@host's", "file a?b is me@host's"),
    ],
)
def test_secrets_are_masked(text: str, hidden: str) -> None:
    assert mask_secrets(text) == hidden
    assert mask_secrets(hidden) == hidden


def test_nested_values_are_masked() -> None:
    tree = {"a": ["http://u:p@h", 3, {"b": "x?k=v"}], "c": None}
    assert masked(tree) == {"a": ["http://***@h", 3, {"b": "x?k=***"}], "c": None}


def test_every_user_error_is_masked_also_on_other_ranks() -> None:
    error = RunError("http://u:p@h does not answer")
    there = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    assert str(error) == str(there) == "http://***@h does not answer"
    assert str(DataError()) == ""


def test_a_command_is_named_without_its_words() -> None:
    name = "shards/train-000000.tar"
    assert shown("pipe:curl -H 'Authorization: K' h/{}", name) == f"pipe:curl *** {name}"
    assert shown(url_of("s3://bucket/data", name), name) == f"s3://bucket/data/{name}"
    assert shown(f"https://u:p@h/{name}?t=1", name) == f"https://***@h/{name}?t=***"
    error = OSError("((['curl', '-u', 'me:pw'],), {'bufsize': 8192}): exit 22 (read) {}")
    assert reason(error) == "its program ends with exit 22"
