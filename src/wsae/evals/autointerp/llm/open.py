"""A language model from its settings."""

import importlib.util

from wsae.core.errors import UserError
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.types import Llm


def open_llm(cfg: LlmConfig) -> Llm:
    """Return the endpoint or local model of the settings; nothing is asked yet.

    Raises UserError in one line: no endpoint, a package that is not installed, a key that cannot be one, no such model.
    """
    if not cfg.endpoint:
        raise UserError(
            "no language model: give --endpoint https://HOST/v1 --model NAME, or --endpoint local:MODEL"
        )
    if cfg.local is not None:
        _need("transformers", "lm")
        from wsae.evals.autointerp.llm.local import LocalModel

        return LocalModel(cfg)
    _need("httpx", "interp")
    from wsae.evals.autointerp.llm.client import Endpoint

    return Endpoint(cfg)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install 'wsae[{extra}]'")
