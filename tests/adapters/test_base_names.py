"""Whether an adapter's own word for its base is one of the names of the base at hand."""

from pathlib import Path

import pytest

from qlora_lab.adapters.saved_adapter import SavedAdapter, check_base_name
from qlora_lab.errors import ModelError


def check(told: str | None, *names: str) -> None:
    check_base_name("the adapter", SavedAdapter({"base_model_name_or_path": told}, {}, {}), names)


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ("org/model", ("org/model",)),
        ("Org/Model", ("llama_7b", "org/model")),
        ("org/model", ("model",)),  # a copy whose owner is not known
        ("model", ("org/model",)),
        ("/somewhere/model", ("org/model",)),
        ("org/model", ("/somewhere/model",)),
        ("../of/model", ("org/model",)),
        ("./model", ("org/model",)),
        ("llama_7b", ("llama_7b", "org/model")),
        (None, ("org/model",)),
    ],
)
def test_names_that_may_be_those_of_one_model(told: str | None, names: tuple[str, ...]) -> None:
    check(told, *names)


@pytest.mark.parametrize(
    ("told", "names", "ours"),
    [
        ("org/other", ("llama_7b", "org/model"), "llama_7b"),
        ("other", ("org/model",), "org/model"),
        ("other/model", ("org/model",), "org/model"),
        ("other/model", ("model", "org/model"), "org/model"),
        ("model/model", ("org/model",), "org/model"),
        ("org/model-v2", ("org/model",), "org/model"),
    ],
)
def test_another_base_is_refused_also_where_only_its_owner_is_another(
    told: str, names: tuple[str, ...], ours: str
) -> None:
    with pytest.raises(ModelError) as error:
        check(told, *names)
    assert str(error.value) == (
        f"the adapter is for the base '{told}', and this one is '{ours}'; take its own base, or if they are the same "
        f"model, write '{ours}' as base_model_name_or_path into its adapter_config.json"
    )


def test_a_folder_that_is_there_has_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/model").mkdir(parents=True)
    check("models/model", "org/model")
    check("org/model", "models/model")
    with pytest.raises(ModelError, match="is for the base 'elsewhere/model'"):
        check("elsewhere/model", "org/model")
