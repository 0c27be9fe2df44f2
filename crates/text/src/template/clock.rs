//! The `strftime_now` function: today's date for templates that tell it to the model.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

/// Where the time comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Clock {
    /// The machine's clock.
    System,
    /// Seconds since the epoch, for tests.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests hold the time still"))]
    Fixed(u64),
}

impl Clock {
    /// Formats the time as `strftime` does in the C locale. The time is UTC: workers of one cluster
    /// must agree.
    pub(super) fn format(self, format: &str) -> Result<String, Error> {
        let seconds = match self {
            Self::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since_epoch| since_epoch.as_secs()),
            Self::Fixed(seconds) => seconds,
        };
        strftime(seconds, format)
    }
}

fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) =
        (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    let (year, month, day, day_of_year) = civil(days);
    let month_name = MONTHS[month - 1];
    // The epoch was a Thursday.
    let weekday = WEEKDAYS[usize::try_from((days + 4) % 7).unwrap_or(0)];
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (directive, pad) = match chars.next() {
            // glibc's extension, which templates use to drop the leading zero.
            Some('-') => (chars.next(), false),
            directive => (directive, true),
        };
        let number = |value: u64, width: usize| {
            if pad { format!("{value:0width$}") } else { value.to_string() }
        };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map_or_else(String::new, String::from);
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know the directive `%{other}`"),
                ));
            }
        });
    }
    Ok(out)
}

/// Returns year, month, day of the month and day of the year (all from 1) of a day since the epoch.
fn civil(mut days: u64) -> (u64, usize, u64, u64) {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let length = |year| if leap(year) { 366 } else { 365 };
    // The calendar repeats every 400 years of 146,097 days.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= length(year) {
        days -= length(year);
        year += 1;
    }
    let day_of_year = days + 1;
    let mut month = 1;
    for month_days in [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < month_days {
            break;
        }
        days -= month_days;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d @SECONDS +FORMAT` says so.
        let format = "%Y-%m-%d %H:%M:%S %A %j";
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 Thursday 001"),
            (951_782_400, "2000-02-29 00:00:00 Tuesday 060"),
            (1_735_689_599, "2024-12-31 23:59:59 Tuesday 366"),
            (4_107_542_400, "2100-03-01 00:00:00 Monday 060"),
            (13_574_563_200, "2400-02-29 00:00:00 Tuesday 060"),
        ] {
            assert_eq!(strftime(seconds, format).unwrap(), expected, "{seconds}");
        }
    }

    #[test]
    fn directives() {
        let noon = 1_754_049_605; // 2025-08-01 12:00:05
        assert_eq!(strftime(noon, "%d %b %Y").unwrap(), "01 Aug 2025");
        assert_eq!(strftime(noon, "%B %-d, %y, %I:%M %p %%").unwrap(), "August 1, 25, 12:00 PM %");
        let error = strftime(noon, "%Q").unwrap_err().to_string();
        assert!(error.contains("`%Q`"), "{error}");
    }
}
