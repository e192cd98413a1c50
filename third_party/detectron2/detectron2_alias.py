"""Make ``import detectron2`` find the Detectron2 that the PyPI wheel LabGym carries.

``detectron2`` and ``detectron2.anything`` become further names of the very same module objects as
``LabGym.detectron2`` and ``LabGym.detectron2.anything``, so every registry, catalog and class
exists once. A Detectron2 that is installed under its own name is found first and used instead.

``detectron2_alias.pth`` calls :func:`install` whenever the interpreter starts. That only appends
one object to ``sys.meta_path``; nothing is searched for or loaded until ``detectron2`` is imported.
"""

import sys

ALIAS = "detectron2"
TARGET = "LabGym.detectron2"


def install() -> None:
    """Append the finder for the package to ``sys.meta_path``, after the regular finders."""
    if not any(isinstance(finder, _PackageFinder) for finder in sys.meta_path):
        sys.meta_path.append(_PackageFinder())


class _PackageFinder:
    """Finds ``detectron2`` itself, asked only when no other finder knows it."""

    def find_spec(self, fullname, path=None, target=None):
        return _alias_spec(fullname) if fullname == ALIAS else None


class _SubmoduleFinder:
    """Finds ``detectron2.x``, put first once the alias is in use.

    The aliased package has a ``__path__``, in which the regular finder would find its files and
    load them a second time.
    """

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(ALIAS + ".") or ALIAS not in sys.modules:
            return None
        # Somebody may have put an installed Detectron2 in the alias' place since.
        if sys.modules[ALIAS] is not sys.modules.get(TARGET):
            return None
        return _alias_spec(fullname)


class _AliasLoader:
    """Hands out the target module where the import system asks for a new one."""

    def __init__(self, target_spec):
        self.target_spec = target_spec

    def create_module(self, spec):
        import importlib

        if spec.name == ALIAS:
            _alias_loggers()
        module = importlib.import_module(self.target_spec.name)
        # The import system overwrites __spec__ between create_module and exec_module.
        self.original_spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.original_spec
        if self.target_spec.name == TARGET:
            _name_default_logger()
            if not any(isinstance(finder, _SubmoduleFinder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _SubmoduleFinder())

    def get_code(self, fullname):
        """Code object for ``python -m detectron2.x``."""
        return self.target_spec.loader.get_code(self.target_spec.name)


def _target_name(alias_name):
    return TARGET + alias_name[len(ALIAS) :]


def _alias_spec(fullname):
    from importlib.util import find_spec, spec_from_loader

    try:
        target_spec = find_spec(_target_name(fullname))
    except ModuleNotFoundError:  # the wheel is not installed
        target_spec = None
    if target_spec is None:
        return None
    spec = spec_from_loader(
        fullname,
        _AliasLoader(target_spec),
        origin=target_spec.origin,
        is_package=target_spec.submodule_search_locations is not None,
    )
    if target_spec.submodule_search_locations is not None:
        spec.submodule_search_locations.extend(target_spec.submodule_search_locations)
    spec.has_location = target_spec.has_location
    return spec


def _alias_loggers():
    """Let ``getLogger("LabGym.detectron2.x")`` return the logger ``detectron2.x``.

    Log lines, levels and handlers are then the same as with a Detectron2 under its own name.
    """
    import logging

    manager = logging.Logger.manager
    get_logger = manager.getLogger

    def get_aliased_logger(name):
        if isinstance(name, str) and (name == TARGET or name.startswith(TARGET + ".")):
            name = ALIAS + name[len(TARGET) :]
        return get_logger(name)

    manager.getLogger = get_aliased_logger


def _name_default_logger():
    """Have ``setup_logger()`` set up the logger ``detectron2``, abbreviated to ``d2`` in lines."""
    from LabGym.detectron2.utils.logger import setup_logger

    setup_logger.__wrapped__.__kwdefaults__["name"] = ALIAS
