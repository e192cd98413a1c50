"""From a configuration file and ``KEY VALUE`` pairs to a configuration."""

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_deformable_detr_config
from ..errors import UserError


def setup_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Build the configuration of a run.

    Args:
        config_file: path of a YAML file; empty for the defaults.
        opts: alternating keys and values that override the file.

    Raises:
        UserError: if a file is missing or no YAML, or a key or a value is wrong.
    """
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    if config_file:
        _check_keys(_read_yaml(config_file), cfg, config_file)
        try:
            cfg.merge_from_file(config_file)
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{config_file}: {_text(error)}") from error
    _merge_options(cfg, list(opts))
    if cfg.MODEL.META_ARCHITECTURE != "DeformableDETR":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; this program runs "
            "'DeformableDETR'. Start from a file in configs/."
        )
    return cfg


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        present = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        hint = nearest(os.path.basename(path), [name for name in present if name.endswith(".yaml")])
        raise UserError(
            f"config file {path} does not exist"
            + (f"; did you mean {os.path.join(folder, hint)}?" if hint else ".")
        )
    try:
        content = CfgNode.load_yaml_with_base(path)
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is no valid YAML: {_text(error)}") from error
    except FileNotFoundError as error:
        raise UserError(
            f"config file {path}: its _BASE_ {error.filename} does not exist."
        ) from error
    except (AttributeError, TypeError, AssertionError, UnicodeDecodeError) as error:
        raise UserError(
            f"config file {path} is no Detectron2 configuration: expected nested KEY: value pairs."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"config file {path} is no Detectron2 configuration: expected nested KEY: value pairs."
        )
    return content


def _merge_options(cfg: CfgNode, opts: list[str]) -> None:
    if len(opts) % 2:
        raise UserError(
            f"options must come in KEY VALUE pairs, but {opts[-1]!r} has no partner in: "
            + " ".join(opts)
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key not in set(_leaves(cfg)):
            raise UserError(_unknown_key(key, cfg, "the command line"))
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{key} {value}: {_text(error)}") from error


def _check_keys(content: dict[str, Any], cfg: CfgNode, source: str) -> None:
    known = set(_leaves(cfg))
    for key in _leaves(content):
        if key not in known:
            raise UserError(_unknown_key(key, cfg, source))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Full names of all keys, those of inner nodes first."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _unknown_key(key: str, cfg: CfgNode, source: str) -> str:
    hint = nearest(key, list(_leaves(cfg)))
    return f"unknown configuration key {key} in {source}" + (
        f"; did you mean {hint}?" if hint else "."
    )


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The one of ``words`` most like ``word``, if any is much like it."""
    by_folded = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), list(by_folded), n=1, cutoff=0.5)
    return by_folded[found[0]] if found else None


def _text(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
