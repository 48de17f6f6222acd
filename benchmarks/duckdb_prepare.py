"""RAW OUT MEMORY_LIMIT THREADS: the least that a preparation of KuaiSAR must do, in bare duckdb. The measure
for `gensr prepare kuaisar`.

Reads both logs, keeps usable clicks once, filters users and items (both tasks, five clicks, until stable),
splits by day, sorts by user and time, and writes the same events to parquet, one file a split. No catalogue,
histories, negatives, shards or checks. Prints the events of each split as JSON.
"""

import json
import sys
from pathlib import Path

import duckdb

DAY_MS, BEIJING_MS = 86_400_000, 8 * 3_600_000
SPLITS = {"train": "day < last - 1", "valid": "day = last - 1", "test": "day = last"}


def prepare(raw: Path, out: Path, memory_limit: str, threads: int) -> dict[str, int]:
    """Write OUT/{train,valid,test}.parquet; returns the number of events of each."""
    out.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect(str(out / "work.duckdb"))
    con.execute(
        f"SET memory_limit='{memory_limit}'; SET threads={threads}; SET preserve_insertion_order=false; SET "
        f"temp_directory='{out / 'spill'}'"
    )
    con.execute(
        f"""CREATE TABLE clicks AS
        SELECT DISTINCT user_id::BIGINT AS user_id, item_id::BIGINT AS item_id, timestamp::BIGINT AS time,
            0::TINYINT AS task, NULL::VARCHAR AS query
        FROM read_csv('{raw / "rec_inter.csv"}', header=true) WHERE click >= 1
        UNION ALL
        SELECT DISTINCT user_id::BIGINT, item_id::BIGINT, search_session_timestamp::BIGINT, 1::TINYINT,
            keyword
        FROM read_csv('{raw / "src_inter.csv"}', header=true, types={{'keyword': 'VARCHAR'}})
        WHERE click_cnt >= 1 AND item_type IN ('VIDEO', 'IMAGE_ATLAS') AND keyword NOT IN ('', '[]')"""
    )
    size = -1
    while size != (size := con.execute("SELECT count(*) FROM clicks").fetchall()[0][0]):
        con.execute(
            """CREATE OR REPLACE TABLE clicks AS SELECT * FROM clicks
            WHERE user_id IN (SELECT user_id FROM clicks GROUP BY 1
                              HAVING count(*) >= 5 AND min(task) <> max(task))
              AND item_id IN (SELECT item_id FROM clicks GROUP BY 1 HAVING count(*) >= 5)"""
        )
    counts = {}
    days = (
        f"SELECT *, (time + {BEIJING_MS}) // {DAY_MS} AS day, "
        f"(SELECT (max(time) + {BEIJING_MS}) // {DAY_MS} FROM clicks) AS last FROM clicks"
    )
    for split, rule in SPLITS.items():
        query = f"SELECT * EXCLUDE (day, last) FROM ({days}) WHERE {rule} ORDER BY user_id, time"
        counts[split] = con.execute(
            f"COPY ({query}) TO '{out / f'{split}.parquet'}' (FORMAT parquet)"
        ).fetchall()[0][0]
    con.close()
    (out / "work.duckdb").unlink()
    return counts


if __name__ == "__main__":
    print(json.dumps(prepare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
