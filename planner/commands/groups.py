"""Texts that run side by side, as check and sweep run them: in whole groups."""


def whole_groups(num_texts: int, batch: int) -> int:
    """As many texts or a few more, so that no group runs with fewer streams than the batch that was asked about."""
    return -(-num_texts // batch) * batch


def shared_moments(batch: int, num_texts: int) -> list[str]:
    """What intervals over texts leave out where texts shared their rounds."""
    if batch == 1:
        return []
    groups = f"{num_texts // batch} group" + "s" * (num_texts > batch)
    warning = (
        f"{num_texts} texts ran in {groups} of {batch}, which share the machine's moment; intervals count texts, so they are too narrow "
        "where the machine is restless: raise --texts before trusting a small difference"
    )
    return [warning]
