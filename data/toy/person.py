"""A person who labels a queue of the toy's pairs through the page, by the toy's own rule.

RUN=outputs/few QUEUE=queue.csv python -m serving.page &
python data/toy/person.py http://127.0.0.1:8000 data/toy/tables
"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import make_toy


def post(url, **said):
    """What the page answers."""
    request = Request(url, json.dumps(said).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.loads(answer.read())


def main(url, tables):
    sizes = json.loads((Path(tables) / "toy.json").read_text())
    world = make_toy.make_world(sizes["scale"], sizes["seed"])
    pins = dict(zip(make_toy.pin_ids(range(len(world["pins"]))), world["pins"]))
    queries = dict(zip(make_toy.query_ids(range(len(world["queries"]))), world["queries"]))
    pair = post(f"{url}/next", name="person")
    while "pin_id" in pair:
        query_id = pair["query_id"]
        pin_id = pair["pin_id"]
        level = make_toy.relevance(queries[query_id]["meaning"], pins[pin_id])
        post(f"{url}/label", name="person", query_id=query_id, pin_id=pin_id, level=int(level))
        pair = post(f"{url}/next", name="person")
    print(f"{pair['done']:,} pairs labelled")


if __name__ == "__main__":
    main(*sys.argv[1:])
