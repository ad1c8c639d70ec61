"""The embedded models: the real one's conversion against what it is known to say, the tiny ones for sameness."""

import subprocess
import sys
from pathlib import Path

import pytest

from omni.deployment import embedded_model, gguf_to_hf
from omni.deployment.embedded_model import EMBEDDED_MODELS, embedded_model_path, ensure_embedded_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def smollm2():
    """In the user's cache: a quarter of a gigabyte, made anew whenever the converter changes."""
    return ensure_embedded_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return load_model(smollm2)


def load_model(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def generate(model, prompt_ids, num_tokens):
    """The greedy continuation, and the smallest lead of a chosen token's logit over the next best."""
    token_ids, leads = list(prompt_ids), []
    for _ in range(num_tokens):
        with torch.inference_mode():
            best = model(torch.tensor([token_ids])).logits[0, -1].topk(2)
        leads.append(float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
    return token_ids[len(prompt_ids) :], min(leads)


class TestSmolLM2:
    def test_it_knows_the_capital_of_france(self, smollm2_model, smollm2_tokenizer):
        prompt_ids = smollm2_tokenizer("The capital of France is").input_ids
        token_ids, _ = generate(smollm2_model, prompt_ids, num_tokens=2)
        assert smollm2_tokenizer.decode(token_ids) == " Paris."

    def test_a_chat_ends_with_the_end_token(self, smollm2_model, smollm2_tokenizer):
        prompt_ids = smollm2_tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        token_ids, _ = generate(smollm2_model, prompt_ids, num_tokens=8)
        assert smollm2_tokenizer.decode(token_ids) == "The capital of France is Paris.<|im_end|>"
        assert smollm2_tokenizer.decode(token_ids, skip_special_tokens=True) == "The capital of France is Paris."
        assert token_ids[-1] == smollm2_tokenizer.eos_token_id == smollm2_model.generation_config.eos_token_id

    def test_the_configuration_is_the_models_own(self, smollm2):
        config = transformers.AutoConfig.from_pretrained(smollm2)
        assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
        assert config.tie_word_embeddings
        assert config.dtype == torch.bfloat16
        assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (3, 64, 8192)

    @pytest.mark.parametrize(
        "text", ["你好 世界。", "👍🏽 café e\u0301", "def f(x):\n\n    return  x", "Room 12  345 's"]
    )
    def test_text_survives_the_tokenizer(self, smollm2_tokenizer, text):
        assert smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids) == text

    def test_every_digit_is_a_token_and_nothing_comes_before(self, smollm2_tokenizer):
        assert smollm2_tokenizer.convert_ids_to_tokens(smollm2_tokenizer("12  345").input_ids) == [
            *("1", "2", "ĠĠ", "3", "4", "5")
        ]


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
class TestTinyModels:
    def test_they_are_the_same_bytes_each_time(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path / "first"))
        first = ensure_embedded_model(name)
        monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path / "second"))
        second = ensure_embedded_model(name)
        assert contents(first) == contents(second)

    def test_every_byte_is_a_token(self, name, cache):
        tokenizer = transformers.AutoTokenizer.from_pretrained(ensure_embedded_model(name))
        text = "你好 👍 e\u0301\n  x\x00ÿ"
        assert tokenizer(text).input_ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]

    def test_the_text_depends_on_what_is_far_back(self, name, cache):
        model = load_model(ensure_embedded_model(name))
        prompt = b"Prefill computes the prompt once; decode reads its KV blocks from the other pool. " * 4
        changed = prompt[:16] + b"################" + prompt[32:]
        token_ids, lead = generate(model, prompt, num_tokens=24)
        assert token_ids != generate(model, changed, num_tokens=24)[0]
        assert len(set(token_ids)) > 6  # not one token over and over
        assert all(32 <= token_id < 127 for token_id in token_ids)
        assert lead > 1e-3  # float32 engines cannot disagree


def contents(folder: Path):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class TestEnsure:
    def test_the_cache_directory_follows_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.delenv("OMNI_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        assert embedded_model_path("tiny") == Path("/home/someone/.cache/omni/models/tiny")
        monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
        assert embedded_model_path("tiny") == Path("/var/cache/omni/models/tiny")
        monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path))
        assert embedded_model_path("tiny") == tmp_path / "models" / "tiny"

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(
            ValueError, match="unknown embedded model 'gpt': choose one of smollm2-135m, tiny, tiny-moe"
        ):
            ensure_embedded_model("gpt")

    def test_a_finished_folder_is_kept(self, cache):
        path = ensure_embedded_model("tiny")
        before = (path / "model.safetensors").stat()
        assert (ensure_embedded_model("tiny") / "model.safetensors").stat() == before

    def test_a_changed_converter_rebuilds_and_leaves_nothing_behind(self, cache):
        path = ensure_embedded_model("tiny")
        (path / ".converter").write_text("an older version")
        (path / "model.safetensors").write_bytes(b"old")
        (path.parent / ".tiny.building").mkdir()  # of a process that was killed
        ensure_embedded_model("tiny")
        assert (path / "model.safetensors").stat().st_size > 1_000_000
        assert sorted(entry.name for entry in path.parent.iterdir()) == [".tiny.lock", "tiny"]

    def test_processes_at_once_build_one_folder(self, cache):
        command = [sys.executable, "-m", "omni.deployment.embedded_model", "tiny"]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        path = cache / "models" / "tiny"
        assert outputs == [f"{path}\n"] * 3
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert sorted(entry.name for entry in path.parent.iterdir()) == [".tiny.lock", "tiny"]

    def test_a_missing_package_says_what_to_install(self, cache, monkeypatch, capsys):
        monkeypatch.setattr(embedded_model, "_SMOLLM2_PACKAGE", "no_such_package")
        assert embedded_model.main(["smollm2-135m"]) == 1
        assert "needs no_such_package: install the cpu extra: make install" in capsys.readouterr().err

    def test_a_failed_build_is_not_taken_for_a_model(self, cache, monkeypatch):
        def fail(folder):
            (folder / "config.json").write_text("{}")
            raise OSError("disk full")

        monkeypatch.setitem(EMBEDDED_MODELS, "tiny", fail)
        with pytest.raises(OSError, match="disk full"):
            ensure_embedded_model("tiny")
        assert not embedded_model_path("tiny").exists()


def test_tensor_names_follow_hugging_face():
    assert gguf_to_hf.hf_tensor_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert gguf_to_hf.hf_tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"unknown GGUF tensor name: a\.b\.c"):
        gguf_to_hf.hf_tensor_name("a.b.c")
