"""Names of genes as files have them: what they stand for where that is certain, and what they are where it is not.

Tried only for names that are no Ensembl id, symbol or alias as they stand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

Lookup = Callable[[str], tuple[str | None, bool]]
"""Ensembl id of a name that is spelled as it should be, and whether the name is ambiguous."""

_ID = re.compile(r"(ENS[A-Z]*G)(R?\d{10,11})(\.\d+)?(_\d+)?(_PAR_Y)?", re.IGNORECASE)
_HUMAN = re.compile(r"(?:GRCh3[78]|hg19|hg38|b37|human|Homo_sapiens|hs)(?:[-.:]|_+)(?=.)", re.IGNORECASE)
_WITH_ID = re.compile(r"(?:^|[\s_|:;,/(\[-])(ENSG(?:R\d{10}|\d{11}))(?:\.\d+)?(?:_PAR_Y)?(?=$|[\s_|:;,/)\]-])")
_ORF = re.compile(r"C(\d{1,2}|X|Y)ORF(\d+)([A-Z]?)")
_NUMBERED = re.compile(r"(.+)[.](\d+)")
_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC"
_MONTH = {name: number for number, name in enumerate(_MONTHS.split(), 1)}
_DAY_MONTH = re.compile(r"(\d{1,2})[-/ ]([A-Z]{3})", re.IGNORECASE)
_MONTH_DAY = re.compile(r"([A-Z]{3})[-/ ](\d{1,2})", re.IGNORECASE)
_ISO = re.compile(r"(?:19|20)\d\d-(\d\d)-(\d\d)(?: 00:00:00)?")

_SPECIES = {
    "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig", "ENSBTAG": "cow",
    "ENSMMUG": "macaque", "ENSMFAG": "macaque", "ENSPTRG": "chimpanzee", "ENSGALG": "chicken", "ENSCAFG": "dog",
    "ENSOCUG": "rabbit", "ENSXETG": "frog",
}  # fmt: skip
_FOREIGN = re.compile(r"(mm9|mm10|mm39|GRCm3[89]|mouse|rn6|rn7|mRatBN7|GRCz1[01]|danRer1[01])(?:[-.:]|_+).", re.I)
_GENOMES = {"m": "mouse", "g": "mouse", "r": "rat", "d": "zebrafish"}
_MOUSE_SYMBOL = re.compile(
    r"[A-Z][a-z][a-z0-9]*(?:[-.][a-z0-9]+)*|[A-Z]\d+[a-z]\w*|mt-[A-Z][a-z0-9]+|\d{7}[A-Z]\d\dRik|Gm\d+"
)
_ZEBRAFISH_SYMBOL = re.compile(r"(si|zgc|zmp|wu):\S+")
_KINDS: Mapping[str, re.Pattern[str]] = {
    "transcripts (ENST)": re.compile(r"ENS[A-Z]*T\d{11}.*"),
    "proteins (ENSP)": re.compile(r"ENS[A-Z]*P\d{11}.*"),
    "RefSeq transcripts": re.compile(r"[NX][MR]_\d+.*"),
    "probes of an array": re.compile(r".+_at|ILMN_\d+"),
    "regions of the genome": re.compile(r"(chr)?(\d{1,2}|[XYM]|MT)[:_-]\d+[-_]\d+"),
    "numbers (Entrez ids, or dates of a spreadsheet)": re.compile(r"\d+(\.0)?"),
    "symbols in lower case": re.compile(r"[a-z][a-z0-9.-]*"),
}


def certain_gene(name: str, lookup: Lookup) -> str | None:
    """Return the Ensembl id that a name stands for beyond doubt, or None.

    Understood are blanks at the ends; ids in any case, with the suffix of a lift (``ENSG..5_2``) or as ``ENSGR``; the
    prefix of a human genome (``GRCh38_``, ``hg19_``); an id beside a symbol; dots for hyphens, as R writes names;
    ``C1ORF112``; and dates of a spreadsheet that only one gene's symbol becomes (``2-Sep``, ``3-Mar``).
    """
    return next((found for found in _readings(name.strip(), lookup) if found is not None), None)


def _readings(name: str, lookup: Lookup) -> Iterator[str | None]:
    yield _by_id(name)
    yield _exactly(name, lookup)
    prefix = _HUMAN.match(name)
    if prefix:
        rest = name[prefix.end() :]
        yield _by_id(rest)
        yield _exactly(rest, lookup)
        name = rest
    ids = set(_WITH_ID.findall(name))
    if len(ids) == 1:
        yield _by_id(ids.pop())
    numbered = _NUMBERED.fullmatch(name)
    # STAT1.1 may be a second column called STAT1, and KRTAP1.1 the gene KRTAP1-1.
    if "." in name and not (numbered and lookup(numbered[1])[0]):
        yield _exactly(name.replace(".", "-"), lookup)
        yield _exactly(name.replace(".", "-", 1), lookup)
    orf = _ORF.fullmatch(name)
    if orf:
        yield _exactly(f"C{orf[1]}orf{orf[2]}{orf[3]}", lookup)
    date = date_of(name)
    if date is not None:
        yield _of_date(*date, lookup)


def _by_id(name: str) -> str | None:
    match = _ID.fullmatch(name)
    if match is None:
        return None
    # Before 2014 the copy of a gene on Y had an R in place of the first 0.
    number = match[2].upper().replace("R", "0")
    return f"{match[1].upper()}{number}" if len(number) == 11 else None


def _exactly(name: str, lookup: Lookup) -> str | None:
    found, ambiguous = lookup(name)
    return None if ambiguous else found


def date_of(name: str) -> tuple[int, int] | None:
    """Return month and day of a name that a spreadsheet has made a date; None if it is none."""
    for pattern, month, day in ((_DAY_MONTH, 2, 1), (_MONTH_DAY, 1, 2)):
        match = pattern.fullmatch(name)
        if match and match[month].upper() in _MONTH and 1 <= int(match[day]) <= 31:
            return _MONTH[match[month].upper()], int(match[day])
    match = _ISO.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def _of_date(month: int, day: int, lookup: Lookup) -> str | None:
    """Return the gene whose symbol has become this date, if it can be one alone."""
    if month == 3 and 3 <= day <= 11:  # 1 and 2 may be MARCH1 or MARC1, MARCH2 or MARC2
        return _exactly(f"MARCHF{day}", lookup)
    if month == 9:
        return _exactly("SELENOF" if day == 15 else f"SEPTIN{day}", lookup)
    return None


def species_of(name: str) -> str | None:
    """Return the species whose gene a name seems to be, or None if that is human or unknown."""
    name = name.strip()
    match = _ID.fullmatch(name)
    if match:
        return None if match[1].upper() == "ENSG" else _SPECIES.get(match[1].upper(), "another species")
    foreign = _FOREIGN.match(name)
    if foreign:
        return (
            "mouse" if foreign[1].lower().startswith(("mm", "grcm", "mouse")) else _GENOMES.get(foreign[1][0].lower())
        )
    if re.fullmatch(r"FBgn\d+", name):
        return "fruit fly"
    if re.fullmatch(r"WBGene\d+", name):
        return "nematode"
    if re.fullmatch(r"Y[A-P][LR]\d{3}[WC](-[A-Z])?", name):
        return "yeast"
    if _ZEBRAFISH_SYMBOL.fullmatch(name):
        return "zebrafish"
    return "mouse" if _MOUSE_SYMBOL.fullmatch(name) and date_of(name) is None else None


def kind_of(name: str) -> str | None:
    """Return what a name that is no known gene seems to be, or None."""
    name = name.strip()
    species = species_of(name)
    if species is not None:
        return f"genes of {species}"
    if date_of(name) is not None:
        return "dates of a spreadsheet"
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(name)), None)


def explained(names: Sequence[str]) -> str:
    """Return a sentence about what names without a gene seem to be; empty if there is nothing to say.

    Parameters
    ----------
    names
        Names that are no known gene; a few thousand are enough.
    """
    found = Counter(kind for kind in map(kind_of, names) if kind is not None)
    if not found:
        return ""
    kind, n = found.most_common(1)[0]
    if n < max(1, len(names) // 5):
        return ""
    example = next(name for name in names if kind_of(name) == kind)
    species = kind.removeprefix("genes of ")
    if species == kind:
        return f"They look like {kind}: {example!r}."
    guess = "another species" if species == "another species" else f"{species}?"
    return (
        f"They look like {kind}: {example!r} ({guess}). The models know human genes: map them to human orthologs, or "
        "take the human genes of a mixed file."
    )
