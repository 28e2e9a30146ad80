"""Tags of languages (BCP 47): case does not count, `_` is `-`, and `en` takes `en-US`."""


def plain_tag(tag):
    """' en_US' -> 'en-us'. The macro plain_tag of database.py says the same in SQL."""
    return tag.strip().replace("_", "-").lower()


def is_spoken(tag, languages):
    """Does a tag of queries.parquet belong to one of these languages, written in any way?"""
    wanted = [f"{plain_tag(language)}-" for language in languages]
    return f"{tag}-".startswith(tuple(wanted))


def primary(tag):
    """'en-us' -> 'en': the language without region and script."""
    return tag.split("-")[0]
