def pytest_addoption(parser):
    parser.addoption(
        "--write-support", action="store_true", help="write SUPPORT.md from the contract tests of this run"
    )
