"""RAW OUT COPIES: a log in KuaiSAR's schema, COPIES times as large: copies of RAW whose users and items are others each time.

Simulating tens of millions of rows takes longer than preparing them; copies have the same activity, popularity and k-core, and only repeat the queries.
"""

import sys
from pathlib import Path

import duckdb

TABLES = {
    "rec_inter.csv": ("user_id", "item_id"),
    "src_inter.csv": ("user_id", "item_id"),
    "item_features.csv": ("item_id",),
    "user_features.csv": ("user_id",),
    "social_network.csv": ("user_id", "user_follow_id"),
}


def enlarge(raw: Path, out: Path, copies: int) -> None:
    """Write the five CSV files of `raw` into the new folder `out`, each copy with ids beyond those of the one before."""
    out.mkdir(parents=True)
    con = duckdb.connect()

    def scan(name: str) -> str:
        return f"read_csv('{raw / name}', header=true, all_varchar=true)"

    def beyond(column: str, name: str) -> int:
        return int(con.execute(f"SELECT max({column}::BIGINT) + 1 FROM {scan(name)}").fetchall()[0][0])

    step = {"user_id": beyond("user_id", "user_features.csv"), "item_id": beyond("item_id", "item_features.csv")}
    for column, name in (("user_id", "rec_inter.csv"), ("user_id", "src_inter.csv"), ("item_id", "rec_inter.csv"), ("item_id", "src_inter.csv")):
        step[column] = max(step[column], beyond(column, name))
    step["user_follow_id"] = step["user_id"]
    for name, columns in TABLES.items():
        moved = ", ".join(f"({column}::BIGINT + copy * {step[column]}) AS {column}" for column in columns)
        sql = f"SELECT * EXCLUDE (copy) REPLACE ({moved}) FROM {scan(name)} CROSS JOIN (SELECT unnest(range({copies})) AS copy)"
        con.execute(f"COPY ({sql}) TO '{out / name}' (HEADER, DELIMITER ',')")


if __name__ == "__main__":
    enlarge(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
