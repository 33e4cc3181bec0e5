"""Document frequencies for people: a warning, a short table, a picture."""

import io

import torch
from torch import Tensor

from titan_smf import storage
from titan_smf.runtime import format_table
from titan_smf.sparse.idf_file import IdfMetadata

MOST_USED = 0.9
LEAST_USED = 0.01


def usage_warning(metadata: IdfMetadata) -> str:
    """Return a warning if more than 90% or less than 1% of the slots were ever used; else ""."""
    used = metadata.slots_used / (metadata.model.slots * metadata.model.tables)
    share = f"{used:.1%} of the slots occur in the {metadata.documents} background documents"
    if used > MOST_USED:
        return (
            f"{share}: few are free for new knowledge, and updates will change slots that the "
            "background reads. A larger table (memory.n_keys) has more to choose from; smaller "
            "documents (idf.batch_size, idf.seq_len) tell hot slots from rare ones better"
        )
    if used < LEAST_USED:
        return (
            f"{share}: nearly all slots have the same document frequency, so that tfidf ranks much "
            "like tf. Count more documents (idf.num_batches); if it stays so, the model reads few "
            "of its slots (memory/slots_used_fraction in pretraining)"
        )
    return ""


def summary(df: Tensor, counts: Tensor, documents: int) -> str:
    """Return a short table of the counts of all slots, (tables * N,) both."""
    num_slots = len(df)

    def share(number: int) -> str:
        return f"{number:,} ({number / num_slots:.1%})"

    sorted_df = df.sort().values
    points = {"10%": 0.1, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
    quantiles = ", ".join(
        f"{name} {sorted_df[round(q * (num_slots - 1))]:,}" for name, q in points.items()
    )
    hottest = int(counts.topk(max(1, num_slots // 100)).values.sum())
    accesses = int(counts.sum())
    rows = {
        "documents": f"{documents:,}",
        "slots": f"{num_slots:,}",
        "never used": share(int((df == 0).sum())),
        "used in more than half": share(int((2 * df.long() > documents).sum())),
        "quantiles of df": quantiles,
        "accesses": f"{accesses:,}",
        "of these on the hottest 1%": f"{hottest / max(accesses, 1):.1%}",
    }
    return format_table(list(rows.items()))


def draw_histogram(df: Tensor, documents: int, path: str) -> None:
    """Write a PNG: how many slots occur in 0, 1, 2, 3-4, 5-8 ... documents; path or fsspec URL."""
    from matplotlib.figure import Figure  # 0.3 s to import

    lasts = [0]  # the last number of documents that belongs to each bar
    while lasts[-1] < documents:
        lasts.append(min(max(1, 2 * lasts[-1]), documents))
    bars = torch.bucketize(df.long(), torch.tensor(lasts)).bincount(minlength=len(lasts))
    firsts = [0, *(last + 1 for last in lasts[:-1])]
    labels = [
        f"{a:,}" if a == b else f"{a:,}\N{EN DASH}{b:,}" for a, b in zip(firsts, lasts, strict=True)
    ]
    percent = (100 * bars.double() / len(df)).tolist()

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = axes.bar(labels, percent, color=["0.6"] + ["tab:blue"] * (len(bars) - 1))
    axes.bar_label(drawn, [f"{p:.1f}" if p >= 0.05 or p == 0 else "<0.1" for p in percent])
    axes.set_xlabel(f"background documents that access the slot, of {documents:,}")
    axes.set_ylabel("% of slots")
    axes.set_title(f"Document frequency of {len(df):,} memory slots (grey: never used)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", rotation=30 if len(labels) > 10 else 0)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    storage.write_bytes(path, content.getvalue())
