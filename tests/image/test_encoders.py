from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stofm.image.encoders import choose_encoder
from stofm.nn import UntrainedModelWarning
from stofm.nn.device import seeded

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


def resnet_weights() -> dict[str, torch.Tensor]:
    """Of a ResNet of one block, three wide."""
    generator = torch.Generator().manual_seed(0)
    state = {"conv1.weight": (3, 3, 7, 7)}
    state |= {f"layer1.0.conv{k}.weight": (3, 3, 3, 3) for k in (1, 2)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in state.items()}
    for name in ("bn1", "layer1.0.bn1", "layer1.0.bn2"):
        found |= {f"{name}.{part}": torch.zeros(3) for part in ("bias", "running_mean")}
        found |= {f"{name}.{part}": torch.ones(3) for part in ("weight", "running_var")}
    return found


@pytest.fixture
def patches() -> torch.Tensor:
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(4))


def test_random_weights_are_warned_of_and_recorded() -> None:
    with pytest.warns(UntrainedModelWarning, match="random, not trained"):
        first = choose_encoder("cnn", CPU)
    with pytest.warns(UntrainedModelWarning):
        again = choose_encoder("cnn", CPU)
    assert first.fingerprint == again.fingerprint != ""
    assert first.n_pixels == 64


def test_a_function_gets_patches_and_gives_rows(patches: torch.Tensor) -> None:
    encoder = choose_encoder(lambda x: x.mean(dim=(2, 3)).numpy(), CPU)
    assert (encoder.n_pixels, encoder.fingerprint) == (224, "")
    np.testing.assert_allclose(encoder(patches), patches.mean(dim=(2, 3)), rtol=1e-6)


def test_a_module_is_known_by_its_weights(patches: torch.Tensor) -> None:
    with seeded(0):
        module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 7))
    module.n_pixels, module.name = 24, "mine"
    encoder = choose_encoder(module, CPU)
    assert (encoder.name, encoder.n_pixels) == ("mine", 24)
    assert encoder(patches).shape == (5, 7)
    with torch.no_grad():
        module[1].bias += 1
    assert choose_encoder(module, CPU).fingerprint != encoder.fingerprint


def test_what_gives_no_row_for_each_patch_is_refused(patches: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"gave the shape \(5, 3, 24, 24\) for 5 patches"):
        choose_encoder(lambda x: x, CPU)(patches)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        choose_encoder(lambda x: x.mean(dim=(2, 3)) / 0, CPU)(patches)
    with pytest.raises(TypeError, match="found int"):
        choose_encoder(3, CPU)


def test_weights_are_read_from_safetensors_and_from_torch(
    tmp_path: Path, patches: torch.Tensor
) -> None:
    state = resnet_weights()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "other").mkdir()
    torch.save({"epoch": 3, "model": state}, tmp_path / "other" / "weights.pth")
    torch.save(state, tmp_path / "other" / "pytorch_model.bin")
    sources = [tmp_path, tmp_path / "other" / "weights.pth", str(tmp_path / "other")]
    encoders = [choose_encoder(source, CPU) for source in sources]
    assert len({encoder.fingerprint for encoder in encoders}) == 1
    found = [encoder(patches) for encoder in encoders]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_colours_are_normalised_as_the_config_says(tmp_path: Path, patches: torch.Tensor) -> None:
    save_file(resnet_weights(), tmp_path / "model.safetensors")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    of_imagenet = choose_encoder(tmp_path, CPU)
    assert of_imagenet.n_pixels == 224
    stated = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": [3, 96, 96], "license": "mit"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": stated}))
    plain = choose_encoder(tmp_path, CPU)
    assert plain.n_pixels == 96
    scaled = (patches - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    np.testing.assert_allclose(of_imagenet(patches), plain(scaled), atol=1e-4)


def test_a_model_of_the_hub_is_downloaded_without_its_code(
    tmp_path: Path, patches: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    save_file(resnet_weights(), tmp_path / "model.safetensors")
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    encoder = choose_encoder("owner/encoder", CPU)
    assert encoder.name == asked["name"] == "owner/encoder"
    assert not [name for name in asked["allow_patterns"] if name.endswith((".py", "*"))]
    np.testing.assert_array_equal(encoder(patches), choose_encoder(tmp_path, CPU)(patches))


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (print, ("harm",))

    torch.save({"conv1.weight": Harm()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth can't be read .*weights_only=True"):
        choose_encoder(tmp_path / "weights.pth", CPU)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of the built-in models \['cnn', 'statis"):
        choose_encoder("X_missing", CPU)
    with pytest.raises(FileNotFoundError, match="has none of"):
        choose_encoder(tmp_path, CPU)
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds \['epoch'\]; expected tensors by name"):
        choose_encoder(tmp_path / "weights.pth", CPU)


@pytest.mark.parametrize(
    ("card", "level", "said"),
    [
        (
            "---\nlicense: cc-by-nc-nd-4.0\n---\nText",
            "WARNING",
            "is cc-by-nc-nd-4.0: commercial use",
        ),
        ("---\nlicense: other\nlicense_name: h-non-commercial\n---", "WARNING", "other h-non-comm"),
        ("---\ntags: [a]\nlicense: apache-2.0\n---", None, ""),
        ("No head", "INFO", "state no licence"),
    ],
)
def test_licences_that_forbid_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, card: str, level: str | None, said: str
) -> None:
    save_file(resnet_weights(), tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text(card)
    with caplog.at_level(logging.INFO, "stofm"):
        choose_encoder(tmp_path, CPU)
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert said in caplog.text


def test_a_transformers_model_gives_its_class_token(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 15, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=22, image_size=12, patch_size=4)
    with seeded(0):
        model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    stated = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 12, "width": 12}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    state = torch.get_rng_state()
    encoder = choose_encoder(tmp_path, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.n_pixels == 12
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(pixel_values=(images - 0.5) / 0.25).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder(images), expected, atol=1e-5)


def test_a_transformers_model_without_class_token_gives_means(tmp_path: Path) -> None:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[6, 8], depths=[1, 1], num_stages=2)
    with seeded(0):
        model = transformers.ConvNextModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = choose_encoder(tmp_path, CPU)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    mean, std = (
        torch.tensor(one).view(3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = model(pixel_values=(images - mean) / std).last_hidden_state.mean(dim=(2, 3))
    np.testing.assert_allclose(encoder(images), expected, atol=1e-5)


def test_a_transformers_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    sizes = {"hidden_size": 15, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=22, image_size=12, patch_size=4)
    with seeded(0):
        transformers.ViTModel(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if re.search(r"(fc1|intermediate\.dense)\.weight", name))
    save_file(
        {k: v for k, v in state.items() if k != name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lacks weights, such as \[.*(fc1|dense)"):
        choose_encoder(tmp_path, CPU)
