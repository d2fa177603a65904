from tests.support.interpreter import interpret


def test_bank_by_the_interpreter():
    interpret("interpreted_bank.py")
