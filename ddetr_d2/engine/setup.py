"""From a configuration file and ``KEY VALUE`` pairs to a configuration."""

import ast
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_deformable_detr_config
from ..errors import UserError, nearest

META_ARCHITECTURES = ("DeformableDETR", "DETR")


def setup_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Build the configuration of a run.

    Args:
        config_file: path of a YAML file; empty for the defaults.
        opts: alternating keys and values that override the file.

    Raises:
        UserError: if a file is missing or no YAML, or a key or a value is wrong.
    """
    content = _read_yaml(config_file) if config_file else {}
    return _configuration(content, config_file, opts)


def saved_cfg(text: str, source: str, opts: Sequence[str] = ()) -> CfgNode:
    """The configuration that a file was written with, but for the device and the output folder.

    Args:
        text: what ``cfg.dump()`` gave.
        source: the file it is from, for messages.
        opts: alternating keys and values that override it.

    Raises:
        UserError: a key is unknown here, or a key or a value of ``opts`` is wrong.
    """
    content = yaml.safe_load(text)
    content["MODEL"].pop("DEVICE", None)
    content.pop("OUTPUT_DIR", None)
    return _configuration(content, source, opts)


def _configuration(content: dict[str, Any], source: str, opts: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    _check_keys(content, cfg, source)
    try:
        cfg.merge_from_other_cfg(CfgNode(content))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: {_text(error)}") from error
    _merge_options(cfg, list(opts))
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCHITECTURES:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; this program runs "
            f"{' and '.join(META_ARCHITECTURES)}. Start from a file in configs/."
        )
    _check_device(cfg.MODEL.DEVICE)
    return cfg


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE is {name!r}; expected 'cuda' or 'cpu'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {name!r}, but no usable GPU is here; set it to cpu.")


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        present = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        files = [os.path.join(folder, name) for name in present if name.endswith(".yaml")]
        raise UserError(f"config file {path} does not exist{nearest(path, files) or '.'}")
    try:
        content = CfgNode.load_yaml_with_base(path)
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is no valid YAML: {_text(error)}") from error
    except FileNotFoundError as error:
        raise UserError(
            f"config file {path}: its _BASE_ {error.filename} does not exist."
        ) from error
    except (
        AttributeError,
        TypeError,
        AssertionError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:
        raise UserError(
            f"config file {path} is no Detectron2 configuration: expected nested KEY: value pairs."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"config file {path} is no Detectron2 configuration: expected nested KEY: value pairs."
        )
    return content


def _merge_options(cfg: CfgNode, opts: list[str]) -> None:
    late = [word for word in opts if word.startswith("--")]
    if late:
        raise UserError(f"{late[0]} comes too late: give it before the KEY VALUE pairs.")
    if len(opts) % 2:
        raise UserError(
            f"options must come in KEY VALUE pairs, but {opts[-1]!r} has no partner in: "
            + " ".join(opts)
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key not in set(_leaves(cfg)):
            raise UserError(_unknown_key(key, cfg, "the command line"))
        _check_list(key, value, cfg, '{key} "({value!r},)"')
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{key} {value}: {_text(error)}") from error


def _check_keys(content: dict[str, Any], cfg: CfgNode, source: str) -> None:
    known = set(_leaves(cfg))
    for key in _leaves(content):
        if key not in known:
            raise UserError(_unknown_key(key, cfg, source))
        _check_list(
            key, value_of(content, key), cfg, f"{key.split('.')[-1]}: ({{value!r}},) in {source}"
        )


def _check_list(key: str, value: Any, cfg: CfgNode, remedy: str) -> None:
    """Refuse one value where a list of them is expected."""
    if not isinstance(value_of(cfg, key), list | tuple):
        return
    if isinstance(value, str):  # Detectron2 reads lists out of texts
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, str | int | float):
        raise UserError(
            f"{key} is {value!r}, a list is expected: write {remedy.format(key=key, value=value)}"
        )


def value_of(node: dict[str, Any], key: str) -> Any:
    """The value of a key with dots, such as ``MODEL.DEVICE``, in a configuration."""
    for name in key.split("."):
        node = node[name]
    return node


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Full names of all keys, those of inner nodes first."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _unknown_key(key: str, cfg: CfgNode, source: str) -> str:
    return f"unknown configuration key {key} in {source}{nearest(key, _leaves(cfg)) or '.'}"


def _text(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
