from tests.support.interpreter import interpret


def test_parts_by_the_interpreter():
    interpret("interpreted_parts.py")
