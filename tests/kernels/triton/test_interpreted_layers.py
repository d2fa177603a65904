from tests.support.interpreter import interpret


def test_layers_by_the_interpreter():
    interpret("interpreted_layers.py")
