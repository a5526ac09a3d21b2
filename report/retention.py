"""What training forgot: the loss on the general text of data.retention, before and after training."""

from report.charts import escaped
from report.metrics_log import number, set_title


def retention_changes(before: dict, after: dict) -> dict:
    """Returns {set: {"rows", "tokens", "loss_before", "loss_after", "change", "bits_per_byte_before", ...}}.

    Losses are in nats a supervised token, and change = loss_after - loss_before. Above 0, the model has
    forgotten.
    """
    changes = {}
    for name, now in after.items():
        was = before.get(name, {})
        changes[name] = {"rows": now["rows"], "tokens": now["tokens"]}
        for key in ("loss", "bits_per_byte"):
            changes[name] |= {f"{key}_before": was.get(key), f"{key}_after": now[key]}
        known = number(was.get("loss"))
        changes[name]["change"] = None if known is None else now["loss"] - known
    return changes


def retention_lines(changes: dict) -> list[str]:
    """Returns a line of text for each set of retention_changes."""
    lines = []
    for name, found in changes.items():
        losses = f"loss {_figure(found['loss_before'])} -> {_figure(found['loss_after'])}"
        lines.append(
            f"retention  {set_title(name, found)}: {losses} ({_signed(found['change'])} nats a token)"
        )
    return lines


def retention_table(changes: dict) -> str:
    """Returns an HTML table of retention_changes, or "" if there are none."""
    rows = ""
    for name, found in changes.items():
        cells = [f"{found['rows']:,}", _signed(found["change"])]
        for key in ("loss", "bits_per_byte"):
            was, now = (_figure(found[f"{key}_{when}"]) for when in ("before", "after"))
            cells.append(f'<span class="soft">{was} \u2192</span> {now}')
        worse = " <em>worse</em>" if (number(found["change"]) or 0) > 0 else ""
        rows += f'<tr><th scope="row">{escaped(name)}{worse}</th>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    heads = ("General text", "Rows", "Change", "Loss", "Bits per byte")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    caption = "Loss in nats a token on text of data.retention, before \u2192 after"
    return rows and (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _figure(value: object) -> str:
    known = number(value)
    return "-" if known is None else f"{known:.3f}"


def _signed(value: object) -> str:
    known = number(value)
    return "-" if known is None else f"{known:+.3f}"
