"""Names that are written in several ways: of tables and columns, and tags of languages."""

import difflib
import re

ALSO = {  # table or column: other names of it, singular
    "pins": "product item document doc article passage corpus catalog catalogue",
    "queries": "search term keyword topic",
    "labels": "rating judgment judgement qrel annotation",
    "impressions": "ranking result candidate view",
    "engagements": "click event order cart action",
    "boards": "category categorie list collection basket",
    "link_visits": "visit page",
    "pin_id": "product_id item_id document_id doc_id pid docid asin sku id",
    "query_id": "qid topic_id search_id term_id id",
    "query": "query_text search_term search term keyword topic text q",
    "label": "rating relevance grade judgment judgement level score",
    "date": "day time timestamp event_date",
    "count": "n number event quantity",
    "board_title": "board title name category list",
    "dwell_seconds": "dwell dwell_time second duration",
}


def near(name, found):
    """Of the names `found` (columns, or files with their endings), those that may be meant by `name`: the
    likeliest, or none."""
    plain = {re.split(r"[./]", other)[0].strip().lower(): other for other in found}
    for word in ALSO.get(name, "").split():
        for other in (word, word + "s"):
            if other in plain:
                return [plain[other]]
    ids = [other for other in plain if other.endswith("id")] if name.endswith("_id") else []
    return [plain[other] for other in difflib.get_close_matches(name, plain, n=1, cutoff=0.75) or ids[:1]]


def is_spoken(tag, languages):
    """Does a tag of queries.parquet (BCP 47) belong to one of these languages, written in any way? Case does
    not count, `_` is `-`, and `en` takes `en-us`. The macro plain_tag of database.py says the same in SQL."""
    wanted = [language.strip().replace("_", "-").lower() + "-" for language in languages]
    return f"{tag}-".startswith(tuple(wanted))
