import os
import signal

import pytest

from bptools.finetune import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag(number, capsys):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt
        os.kill(os.getpid(), number)
        assert interrupt
        assert interrupt.signal == number
        assert signal.getsignal(number) is before  # the second acts as usual
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capsys.readouterr().err


def test_the_second_ctrl_c_stops_at_once():
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
