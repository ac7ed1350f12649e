import pytest

from launcher.report import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"),
        (0.0002, "0.2 ms"),
        (0.35, "350 ms"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7620, "2 h 07 min"),
        (86400 * 3 + 15000, "3 d 04 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_figures_have_as_many_places_as_one_reads() -> None:
    assert [words.value(each) for each in (None, 7, 12345, 0.93, 341.7425, 12345.67, 0.00002)] == [
        *("-", "7", "12,345", "0.9300", "341.7425", "12,345.7", "2e-05")
    ]
    assert [words.count(each) for each in (7, 9500, 12_500, 3e6, 10.22e9)] == [
        "7",
        "9,500",
        "12.5k",
        "3M",
        "10.22B",
    ]
    assert [words.share(each) for each in (0.0, 0.0001, 0.367)] == ["0.0 %", "< 0.1 %", "36.7 %"]


def test_what_opens_doors_is_not_told() -> None:
    said = words.redacted("--set x=s3://me:secret@bucket/a hf_abcdefghijklmnopqrst /home/a@b")
    assert said == "--set x=s3://***@bucket/a hf_*** /home/a@b"
    assert words.redacted("https://me:p@ss@h/a 's3://b@c/d'") == "https://***@h/a 's3://***@c/d'"
    signed = "'https://h/x.csv?sig=SECRET&se=2030' https://h/?token=SECRET&client_secret=SECRET"
    assert words.redacted(signed) == "'https://h/x.csv?sig=***&se=***' https://h/?token=***&client_secret=***"
    assert words.redacted("part-?/year=2020/a.csv why? a=b") == "part-?/year=2020/a.csv why? a=b"


def test_a_container_of_azure_is_no_secret() -> None:
    assert words.redacted("abfs://data@account.dfs.core.windows.net/x.csv") == (
        "abfs://data@account.dfs.core.windows.net/x.csv"
    )
