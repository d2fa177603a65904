from tests.support.interpreter import interpret


def test_networks_by_the_interpreter():
    interpret("interpreted_networks.py")
