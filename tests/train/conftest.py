"""What several tests of training share."""

import pytest

from jaxcoder.train import loop


@pytest.fixture
def at_step():
    """A function (patch, step, act): `act` is called when that step of the next run is dispatched."""

    def at_step(patch, step: int, act) -> None:
        make = loop.make_train_step

        def make_and_act(config):
            train_step, count = make(config), [0]

            def acting(*arguments):
                count[0] += 1
                if count[0] == step:
                    act()
                return train_step(*arguments)

            return acting

        patch.setattr(loop, "make_train_step", make_and_act)

    return at_step
