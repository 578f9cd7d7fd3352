"""What the tests of the core share: a tiny checkpoint, and engines on it by their settings."""

import pytest

from tests.engine.support import make_core, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def core(folder):
    """Engines by their settings, each made once; between tests they hold nothing."""
    made = {}

    def get(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made or made[key].has_work():  # a test that failed may have left work behind
            made[key] = make_core(folder, **settings)
        assert made[key].reset_prefix_cache()
        return made[key]

    return get
