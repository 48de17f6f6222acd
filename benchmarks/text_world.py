"""RAW: small logs in the schema of `gensr prepare tables`, for `gensr bench train|evaluate` where no prepared
folder is given.

Texts are made of syllables and of the words of the prompts: a tokenizer trained on them then reads the
paper's prompt in about as many tokens as flan-t5's does.
"""

import json
import random
import re
import sys
from pathlib import Path

from trainer.models.gensr.prompt import WORDINGS

USERS, ITEMS, DAYS, CLICKS_A_DAY = 300, 1500, 10, 4
DAY_MS, START_MS = 86_400_000, 1_700_006_400_000
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pra", "ri", "sto", "ta", "ve", "wo")


def main(raw: Path) -> None:
    rng = random.Random(0)
    prompt_words = sorted(
        {
            word
            for tasks in WORDINGS.values()
            for segments in tasks.values()
            for word in re.findall(r"\w+", " ".join(segments))
        }
    )
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(600)] + prompt_words * 4
    raw.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(ITEMS)]
    with (raw / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"item_id": item, "text": text}) + "\n" for item, text in enumerate(texts))
    with (raw / "events.jsonl").open("w", encoding="utf-8") as file:
        for user in range(USERS):
            for day in range(DAYS):
                for _ in range(CLICKS_A_DAY):
                    item, search = rng.randrange(ITEMS), rng.random() < 0.5
                    query = " ".join(rng.sample(texts[item].split(), k=rng.randint(1, 4))) if search else None
                    event = {
                        "user_id": user,
                        "item_id": item,
                        "time": START_MS + day * DAY_MS + rng.randrange(DAY_MS),
                    }
                    file.write(
                        json.dumps({**event, "task": "src" if search else "rec", "query": query}) + "\n"
                    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
