"""Do the numbers fit together: widths, k, groups, the text's length?"""

from wsae.core.errors import UserError
from wsae.doctor.check import Check
from wsae.train.config import MemberConfig


def check_width(hook: str, d_in: int, expected: int | None) -> Check:
    """Compare a hook's width with the one the caller expects."""
    if expected is not None and d_in != expected:
        mend = "name another hook, or leave out --d-in"
        return Check(f"width of {hook}", "fail", f"{d_in}, not {expected}", mend)
    return Check(f"width of {hook}", "ok", str(d_in))


def check_member(hook: str, d_in: int, member: MemberConfig) -> Check:
    """Check k <= d_sae, k groups, and that the code is neither trivial nor narrower than its input."""
    name = f"SAE shape at {hook}"
    try:
        cfg = member.sae_config(d_in)
    except UserError as error:
        return Check(name, "fail", str(error).removeprefix("SAE: "), "change --k or --d-sae")
    k = getattr(cfg.activation, "k", None)
    shown = f"{d_in} -> {cfg.d_sae} latents, {cfg.activation.kind}" + (f", k {k}" if k else "")
    if k is not None and k >= d_in:
        mend = f"choose k well below {d_in}; {k} latents can carry any vector of that width"
        return Check(name, "warn", shown, mend)
    if cfg.d_sae < d_in:
        return Check(name, "warn", shown, f"fewer latents than dimensions; {8 * d_in} is common")
    return Check(name, "ok", shown)


def check_text(have: int, wanted: int, whole: bool) -> Check:
    """Compare the tokens a text holds with those wanted; `whole` says the text was read to its end."""
    about = f"about {have:,} tokens" if whole else f"at least {have:,} tokens"
    if whole and have == 0:
        return Check("text", "fail", "no text in it", "give a file with text")
    if whole and have < wanted:
        mend = f"{wanted:,} are wanted: give more text or lower --tokens (training repeats rows)"
        return Check("text", "warn", about, mend)
    return Check("text", "ok", f"{about} for the {wanted:,} wanted")
