//! Payment for values that are read to their end.
//!
//! The engine charges for a container when it is built, and for the bytes it is written as once they
//! are written. Values share their parts, so `[n, n]` in a loop of sixty is short to build and has no
//! end, and a namespace can even hold itself: written or compared, such a value takes all memory, all
//! time or all of the stack. So whatever reads a value to its end pays for its whole tree before, by
//! calls put into the compiled template.

use std::collections::BTreeMap;

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value, escape_formatter,
    machinery::{CodeGenerator, Instruction, Instructions, eval, make_string_output, parse},
    syntax::SyntaxConfig,
    value::{Rest, ValueKind, ValueOrKwargs},
};
use minijinja_contrib::pycompat;

/// Starts the names of the functions added here: no template and no request can name them.
pub(super) const PREFIX: &str = "paid:";

/// Registers what [`compile`] calls.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| {
        pay(state, value)?;
        escape_formatter(out, state, value)
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        // These compare with what the value holds.
        if matches!(method, "count" | "index") {
            pay(state, value)?;
        }
        args.iter().try_for_each(|value| pay(state, value))?;
        if method == "format"
            && let Some(number) = value.as_str().and_then(wide)
        {
            let reason = format!("format: found a width of {number}, expected at most {MAX_WIDTH}");
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
        pycompat::unknown_method_callback(state, value, method, args)
    });
    // It would write out all variables, and transformers has no such function.
    environment.remove_global("debug");
    environment.add_function(VALUE, |state: &State<'_, '_>, value: Value| {
        pay(state, &value)?;
        Ok::<_, Error>(value)
    });
    environment.add_function(CONCAT, |state: &State<'_, '_>, left: Value, right: Value| {
        pay(state, &left)?;
        pay(state, &right)?;
        Ok::<_, Error>(format!("{left}{right}"))
    });
    environment.add_function(IN, |state: &mut State<'_, '_>, left: Value, right: Value| {
        pay(state, &left)?;
        pay(state, &right)?;
        state.perform_test("in", &[left, right])
    });
    environment.add_function(MAP, |state: &State<'_, '_>, items: Rest<Value>| {
        let pair = |pair: &[Value]| {
            pay(state, &pair[0])?;
            Ok((pair[0].clone(), pair[1].clone()))
        };
        let pairs: Result<Vec<_>, Error> = items.chunks_exact(2).map(pair).collect();
        Ok::<_, Error>(Value::from_pairs(pairs?))
    });
    environment.add_function(CHANGED, |state: &mut State<'_, '_>, values: Rest<Value>| {
        values[1..].iter().try_for_each(|value| pay(state, value))?;
        values[0].call_method(state, "changed", &values[1..])
    });
    for (name, function) in FILTERS {
        environment.add_function(
            *function,
            move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
                let args = args.into_values();
                args.iter().try_for_each(|value| pay(state, value))?;
                state.apply_filter(name, &args)
            },
        );
    }
    for (name, function) in TESTS {
        environment.add_function(
            *function,
            move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
                let args = args.into_values();
                args.iter().try_for_each(|value| pay(state, value))?;
                state.perform_test(name, &args)
            },
        );
    }
}

/// Renders a template that compiles. Compiling takes a fraction of the time of rendering.
pub(super) fn render(
    environment: &Environment<'_>,
    source: &str,
    context: Value,
) -> Result<String, Error> {
    let instructions = compile(source)?;
    let mut text = String::new();
    let mut output = make_string_output(&mut text);
    let blocks = BTreeMap::new();
    eval(environment, &instructions, context, &blocks, &mut output, AutoEscape::None)?;
    drop(output);
    Ok(text)
}

/// Compiles a template and puts the payments in.
pub(super) fn compile(source: &str) -> Result<Instructions<'_>, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let parsed = parse(source, NAME, syntax)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&parsed);
    let (plain, _) = generator.finish();
    let plain: Vec<(&Instruction<'_>, u16)> = (0..)
        .map_while(|at| Some((plain.get(at)?, plain.get_line(at).unwrap_or(1))))
        .map(|(instruction, line)| (instruction, u16::try_from(line).unwrap_or(u16::MAX)))
        .collect();
    let mut is_target = vec![false; plain.len() + 1];
    for (instruction, _) in &plain {
        if let Some(target) = target(&mut (*instruction).clone()) {
            is_target[*target as usize] = true;
        }
    }
    let mut paid = Instructions::new(NAME, source);
    // Where each instruction has gone, with the payment before it.
    let mut places = Vec::with_capacity(plain.len() + 1);
    for (at, (instruction, line)) in plain.iter().enumerate() {
        let constant = matches!(
            at.checked_sub(1).map(|before| plain[before].0),
            Some(Instruction::LoadConst(_))
        ) && !is_target[at];
        let mut place = None;
        if reads_top(instruction)? && !constant {
            place = Some(paid.add_with_line(Instruction::CallFunction(VALUE, Some(1)), *line));
        }
        let itself = paid.add_with_line(with_payment(instruction)?, *line);
        places.push(place.unwrap_or(itself));
    }
    // A jump may go past the end.
    let mut end = 0;
    while let Some(instruction) = paid.get_mut(end) {
        end += 1;
        if let Some(target) = target(instruction) {
            *target = places.get(*target as usize).copied().unwrap_or(u32::MAX);
        }
    }
    Ok(paid)
}

/// Returns where an instruction may jump to.
fn target<'a>(instruction: &'a mut Instruction<'_>) -> Option<&'a mut u32> {
    match instruction {
        Instruction::Iterate(target)
        | Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}

/// Returns whether an instruction reads the value on top of the stack to its end, and no more of
/// other values than has its like there.
fn reads_top(instruction: &Instruction<'_>) -> Result<bool, Error> {
    match instruction {
        // The operator's type is not exported, its name is.
        Instruction::CompareAndPreserve(op) if format!("{op:?}").ends_with("In") => {
            let reason = "`in` within a chain of comparisons is not supported: use `and`";
            Err(Error::new(ErrorKind::SyntaxError, reason))
        }
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::CompareAndPreserve(_)
        | Instruction::GetItem => Ok(true),
        _ => Ok(false),
    }
}

/// Returns an instruction, or a call that pays and does the same.
fn with_payment<'a>(instruction: &Instruction<'a>) -> Result<Instruction<'a>, Error> {
    let paid = |names: &[(&str, &'static str)], name: &str, count: Option<u16>| {
        let (_, function) = names.iter().find(|(known, _)| *known == name)?;
        Some(Instruction::CallFunction(function, count))
    };
    let call = match instruction {
        Instruction::StringConcat => Some(Instruction::CallFunction(CONCAT, Some(2))),
        Instruction::In => Some(Instruction::CallFunction(IN, Some(2))),
        Instruction::BuildMap(pairs) => {
            let values = u16::try_from(pairs * 2).map_err(|_| {
                let reason = format!("a map of {pairs} items, expected at most {}", u16::MAX / 2);
                Error::new(ErrorKind::SyntaxError, reason)
            })?;
            Some(Instruction::CallFunction(MAP, Some(values)))
        }
        Instruction::ApplyFilter(name, count, _) => paid(FILTERS, name, *count),
        Instruction::PerformTest(name, count, _) => paid(TESTS, name, *count),
        Instruction::CallMethod("changed", count) => {
            Some(Instruction::CallFunction(CHANGED, *count))
        }
        _ => None,
    };
    Ok(call.unwrap_or_else(|| instruction.clone()))
}

/// Returns a number in a format that is wider than any text is padded to.
fn wide(format: &str) -> Option<&str> {
    let numbers = format.split(|c: char| !c.is_ascii_digit());
    let fits =
        |number: &str| number.is_empty() || number.parse().is_ok_and(|n: usize| n <= MAX_WIDTH);
    numbers.into_iter().find(|number| !fits(number)).map(|number| &number[..number.len().min(20)])
}

/// Charges for all that a value holds; what has no end takes all fuel.
pub(super) fn pay(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let Some(items) = items(value) else { return Ok(()) };
    let mut open = vec![items];
    let mut unpaid = 0;
    while let Some(items) = open.last_mut() {
        let Some(item) = items.next() else {
            open.pop();
            continue;
        };
        unpaid += UNITS_PER_ITEM + item.as_str().map_or(0, |text| text.len() as u64);
        if let Some(items) = self::items(&item) {
            open.push(items);
            unpaid += UNITS_PER_FUEL;
        }
        if unpaid >= UNITS_PER_FUEL {
            state.consume_fuel(unpaid / UNITS_PER_FUEL)?;
            unpaid %= UNITS_PER_FUEL;
        }
    }
    Ok(())
}

type Items = Box<dyn Iterator<Item = Value>>;

/// Returns what a container holds: keys and values of a map.
fn items(value: &Value) -> Option<Items> {
    match value.kind() {
        ValueKind::Map => {
            let (value, keys) = (value.clone(), value.try_iter().ok()?);
            Some(Box::new(keys.flat_map(move |key| {
                let held = value.get_item(&key).unwrap_or_default();
                [key, held]
            })))
        }
        ValueKind::Seq | ValueKind::Iterable => Some(Box::new(value.try_iter().ok()?)),
        _ => None,
    }
}

macro_rules! paid {
    ($kind:literal: $($name:literal)*) => { &[$(($name, concat!("paid:", $kind, $name))),*] };
}

/// The name of the template.
const NAME: &str = "chat_template";
const VALUE: &str = "paid:value";
const CONCAT: &str = "paid:concat";
const IN: &str = "paid:in";
const MAP: &str = "paid:map";
const CHANGED: &str = "paid:changed";
/// The filters that do more with what a container holds than to hand it on. Our own pay themselves.
const FILTERS: &[(&str, &str)] = paid!["|":
    "attr" "capitalize" "dictsort" "e" "escape" "float" "format" "groupby" "indent" "int" "join" "lower"
    "map" "max" "min" "pprint" "reject" "rejectattr" "replace" "safe" "select" "selectattr" "sort"
    "string" "sum" "title" "trim" "unique" "upper" "urlencode"
];
/// The tests that compare.
const TESTS: &[(&str, &str)] = paid!["?":
    "!=" "<" "<=" "==" ">" ">=" "endingwith" "eq" "equalto" "ge" "greaterthan" "gt" "in" "le"
    "lessthan" "lower" "lt" "ne" "startingwith" "upper"
];
/// The widest that `str.format` may make a field: the engine charges for the result alone.
const MAX_WIDTH: usize = 4096;
/// What one fuel pays for, as in the engine: so many bytes.
const UNITS_PER_FUEL: u64 = super::BYTES_PER_FUEL;
/// What an item costs; one that is a container costs a fuel more.
const UNITS_PER_ITEM: u64 = 8;
