//! Finds the loops in which a template goes through the conversation, and rewrites them so that a rendering can begin
//! in the middle of one.
//!
//! What a loop's body prints for a message follows from the variables that were there when the loop began, from
//! namespaces, which are all that passes from one round to the next, from `loop`, and from the messages that it looks
//! at. The rewritten template hands all of these to [`trace`](super::trace), which so knows what a round depended on. A template
//! in which something else could pass from round to round, or be hidden from the trace, is not rewritten: it renders from
//! the start.

use std::collections::BTreeSet;

use minijinja::machinery::ast::{Call, CallArg, Expr, ForLoop, Stmt};
use minijinja::machinery::{Span, parse};

/// The object that the rewritten template calls.
pub(super) const TRACE: &str = "_hot";

/// The variable that stands in for `loop` in the body of a rewritten one.
const LOOP: &str = "_hot_loop";

/// The variable that every template gets the conversation in.
const MESSAGES: &str = "messages";

/// What a template may call: nothing that keeps a state of its own.
const FUNCTIONS: [&str; 5] = [
    "namespace",
    "range",
    "dict",
    "raise_exception",
    "strftime_now",
];

/// What the trace can answer about a loop.
const LOOP_FIELDS: [&str; 9] = [
    "index",
    "index0",
    "first",
    "last",
    "length",
    "revindex",
    "revindex0",
    "previtem",
    "nextitem",
];

/// The template with its loops over the conversation rewritten. `None` where there is none that can be.
pub(super) fn rewrite(source: &str) -> Option<String> {
    let Ok(Stmt::Template(template)) = parse(source, "", super::syntax()) else {
        return None;
    };
    let mut outline = Outline::default();
    outline.conversation.insert(MESSAGES);
    outline.read(&template.children, true)?;
    let mut all = Body::default();
    all.statements(&template.children);
    let known = |name: &&str| FUNCTIONS.contains(name) || outline.macros.contains(name);
    if source.contains(TRACE) || all.opaque || !all.calls.iter().all(known) {
        return None;
    }
    let mut edits = Edits {
        source,
        edits: Vec::new(),
    };
    let mut count = 0;
    for for_loop in outline.loops(&template.children) {
        if outline.rewrite(for_loop, count, &mut edits).is_some() {
            count += 1;
        }
    }
    for slice in &outline.slices {
        edits.slice(slice)?;
    }
    (count > 0).then(|| edits.apply()).flatten()
}

/// What stands outside of all loops.
#[derive(Default)]
struct Outline<'a> {
    /// Variables that are set there.
    set: BTreeSet<&'a str>,
    /// Those of them that are set wherever the template is past that place.
    always: BTreeSet<&'a str>,
    /// Those that may hold the conversation, or its end from some message on.
    conversation: BTreeSet<&'a str>,
    /// Macros, and the variables that they read.
    macros: BTreeSet<&'a str>,
    macro_reads: BTreeSet<&'a str>,
    /// Where the end of the conversation is taken: the variable, the slice, and the first message.
    slices: Vec<ConversationSlice>,
}

struct ConversationSlice {
    name: Span,
    whole: Span,
    start: i64,
}

impl<'a> Outline<'a> {
    /// Reads the statements outside of loops, in order. `None` for what a trace cannot follow.
    fn read(&mut self, statements: &[Stmt<'a>], always: bool) -> Option<()> {
        for statement in statements {
            match statement {
                Stmt::Set(set) => {
                    if let Expr::Var(target) = &set.target {
                        if self.takes_conversation(&set.expr) {
                            self.conversation.insert(target.id);
                        }
                        self.set.insert(target.id);
                        if always {
                            self.always.insert(target.id);
                        }
                    } else {
                        assigned(&set.target, &mut self.set);
                    }
                }
                Stmt::SetBlock(set) => assigned(&set.target, &mut self.set),
                Stmt::IfCond(condition) => {
                    self.read(&condition.true_body, false)?;
                    self.read(&condition.false_body, false)?;
                }
                Stmt::Macro(declared) => {
                    self.macros.insert(declared.name);
                    let mut body = Body::default();
                    body.expressions(&declared.defaults);
                    body.statements(&declared.body);
                    // A macro that sets what is not its own is called who knows where.
                    let own = |name: &&str| {
                        body.set.contains(name)
                            || declared
                                .args
                                .iter()
                                .any(|arg| is_variable(arg, |it| it == *name))
                    };
                    if !body.attributes.iter().all(|(name, _)| own(name)) || body.hides {
                        return None;
                    }
                    self.macro_reads.extend(body.reads);
                }
                Stmt::ForLoop(for_loop) => {
                    self.takes_conversation(&for_loop.iter);
                }
                Stmt::EmitExpr(_)
                | Stmt::EmitRaw(_)
                | Stmt::Do(_)
                | Stmt::WithBlock(_)
                | Stmt::FilterBlock(_)
                | Stmt::AutoEscape(_)
                | Stmt::CallBlock(_)
                | Stmt::Continue(_)
                | Stmt::Break(_) => {}
                Stmt::Template(_)
                | Stmt::Block(_)
                | Stmt::Import(_)
                | Stmt::FromImport(_)
                | Stmt::Extends(_)
                | Stmt::Include(_) => return None,
            }
        }
        Some(())
    }

    /// Whether this is the conversation, or its end from some message on; notes where that is taken.
    fn takes_conversation(&mut self, expression: &Expr<'a>) -> bool {
        match expression {
            Expr::Var(variable) => self.conversation.contains(variable.id),
            Expr::Slice(slice) => {
                let start = slice
                    .start
                    .as_ref()
                    .and_then(Expr::as_const)
                    .and_then(|start| start.as_i64());
                let (Expr::Var(variable), Some(start @ 0..), None, None) =
                    (&slice.expr, start, &slice.stop, &slice.step)
                else {
                    return false;
                };
                let taken = self.conversation.contains(variable.id);
                if taken {
                    self.slices.push(ConversationSlice {
                        name: variable.span(),
                        whole: slice.span(),
                        start,
                    });
                }
                taken
            }
            Expr::IfExpr(choice) => {
                let one = self.takes_conversation(&choice.true_expr);
                let other = choice
                    .false_expr
                    .as_ref()
                    .is_some_and(|it| self.takes_conversation(it));
                one || other
            }
            Expr::Const(_)
            | Expr::UnaryOp(_)
            | Expr::BinOp(_)
            | Expr::Compare(_)
            | Expr::Filter(_)
            | Expr::Test(_)
            | Expr::GetAttr(_)
            | Expr::GetItem(_)
            | Expr::Call(_)
            | Expr::List(_)
            | Expr::Tuple(_)
            | Expr::Map(_) => false,
        }
    }

    /// The loops outside of other loops.
    fn loops<'t>(&self, statements: &'t [Stmt<'a>]) -> Vec<&'t ForLoop<'a>> {
        let mut found = Vec::new();
        for statement in statements {
            if let Stmt::ForLoop(for_loop) = statement {
                found.push(&**for_loop);
            } else if let Stmt::IfCond(condition) = statement {
                found.extend(self.loops(&condition.true_body));
                found.extend(self.loops(&condition.false_body));
            }
        }
        found
    }

    fn rewrite(&self, for_loop: &ForLoop<'a>, id: usize, edits: &mut Edits<'_>) -> Option<()> {
        let over = for_loop.iter.span();
        let whole = is_variable(&for_loop.iter, |name| self.conversation.contains(name));
        if !whole && !self.slices.iter().any(|slice| slice.whole == over) {
            return None;
        }
        if for_loop.filter_expr.is_some() || for_loop.recursive || !for_loop.else_body.is_empty() {
            return None;
        }
        let mut body = Body {
            in_loop: true,
            ..Body::default()
        };
        assigned(&for_loop.target, &mut body.set);
        body.statements(&for_loop.body);
        if body.opaque || body.hides || body.breaks || !body.prints {
            return None;
        }
        let mut carried = BTreeSet::new();
        for (name, attribute) in &body.attributes {
            // A namespace of the round's own passes nothing on.
            match (body.set.contains(name), self.always.contains(name)) {
                (true, false) if !self.set.contains(name) => {}
                (false, true) => {
                    carried.insert((*name, *attribute));
                }
                _ => return None,
            }
        }
        let reads = body.reads.union(&self.macro_reads);
        let captured: Vec<&str> = reads
            .filter(|name| self.set.contains(*name))
            .copied()
            .collect();
        let (end, sign) = edits.tag_end(over)?;
        edits.insert(over.start_offset, format!("{TRACE}.items({id}, "));
        edits.insert(over.end_offset, format!(", [{}])", captured.join(", ")));
        let states: Vec<String> = carried
            .iter()
            .map(|(name, attribute)| format!("{name}.{attribute}"))
            .collect();
        let mut enter = format!(
            "{{% set {LOOP} = {TRACE}.enter({id}, [{}]) %}}",
            states.join(", ")
        );
        if !states.is_empty() {
            enter += &format!("{{% if {LOOP}.resumed %}}");
            for (index, state) in states.iter().enumerate() {
                enter += &format!("{{% set {state} = {LOOP}.carried[{index}] %}}");
            }
            enter += "{% endif %}";
        }
        // The last tag trims what the loop's own did.
        let open = enter.len() - "%}".len();
        enter.replace_range(open.., &format!("{sign}%}}"));
        edits.insert(end, enter);
        for span in body.loops {
            edits.replace(span, LOOP.to_owned());
        }
        Some(())
    }
}

/// What statements and expressions do.
#[derive(Default)]
struct Body<'a> {
    /// Whether `loop` is that of the loop whose body it is.
    in_loop: bool,
    /// Variables that are read.
    reads: BTreeSet<&'a str>,
    /// Variables that are set.
    set: BTreeSet<&'a str>,
    /// Attributes of namespaces that are set.
    attributes: BTreeSet<(&'a str, &'a str)>,
    /// Functions that are called.
    calls: BTreeSet<&'a str>,
    /// Where `loop` stands.
    loops: Vec<Span>,
    prints: bool,
    /// Whether it leaves the loop whose body it is.
    breaks: bool,
    /// Whether it holds code that runs elsewhere: macros, and what is handed to them.
    hides: bool,
    /// Whether it does what a trace cannot follow.
    opaque: bool,
}

impl<'a> Body<'a> {
    fn statements(&mut self, statements: &[Stmt<'a>]) {
        for statement in statements {
            self.statement(statement);
        }
    }

    fn statement(&mut self, statement: &Stmt<'a>) {
        match statement {
            Stmt::EmitExpr(emit) => {
                self.prints = true;
                self.expression(&emit.expr);
            }
            Stmt::EmitRaw(_) => self.prints = true,
            Stmt::ForLoop(for_loop) => self.nested(for_loop),
            Stmt::IfCond(condition) => {
                self.expression(&condition.expr);
                self.statements(&condition.true_body);
                self.statements(&condition.false_body);
            }
            Stmt::WithBlock(with) => {
                for (target, value) in &with.assignments {
                    self.assign(target);
                    self.expression(value);
                }
                self.statements(&with.body);
            }
            Stmt::Set(set) => {
                self.expression(&set.expr);
                self.assign(&set.target);
            }
            Stmt::SetBlock(set) => {
                self.expressions(set.filter.as_slice());
                self.statements(&set.body);
                self.assign(&set.target);
            }
            Stmt::FilterBlock(filter) => {
                self.expression(&filter.filter);
                self.statements(&filter.body);
            }
            Stmt::AutoEscape(escape) => {
                self.expression(&escape.enabled);
                self.statements(&escape.body);
            }
            Stmt::Macro(declared) => {
                self.hides = true;
                self.expressions(&declared.defaults);
                let mut body = Body::default();
                body.statements(&declared.body);
                self.calls.extend(body.calls);
            }
            Stmt::CallBlock(block) => {
                self.hides = true;
                self.call(&block.call);
                let mut body = Body::default();
                body.statements(&block.macro_decl.body);
                self.calls
                    .extend(body.calls.into_iter().filter(|name| *name != "caller"));
            }
            Stmt::Continue(_) => {}
            Stmt::Break(_) => self.breaks = true,
            Stmt::Do(call) => self.call(&call.call),
            Stmt::Template(_)
            | Stmt::Block(_)
            | Stmt::Import(_)
            | Stmt::FromImport(_)
            | Stmt::Extends(_)
            | Stmt::Include(_) => self.opaque = true,
        }
    }

    /// A loop has a `loop` of its own, but for what it goes over.
    fn nested(&mut self, for_loop: &ForLoop<'a>) {
        self.expression(&for_loop.iter);
        self.statements(&for_loop.else_body);
        let mut inner = Body::default();
        inner.assign(&for_loop.target);
        inner.expressions(for_loop.filter_expr.as_slice());
        inner.statements(&for_loop.body);
        self.opaque |= inner.opaque;
        self.hides |= inner.hides;
        self.prints |= inner.prints;
        self.reads.extend(inner.reads);
        self.set.extend(inner.set);
        self.attributes.extend(inner.attributes);
        self.calls.extend(inner.calls);
    }

    fn assign(&mut self, target: &Expr<'a>) {
        let Expr::GetAttr(attribute) = target else {
            assigned(target, &mut self.set);
            return;
        };
        if let Expr::Var(namespace) = &attribute.expr {
            self.attributes.insert((namespace.id, attribute.name));
            self.reads.insert(namespace.id);
        } else {
            self.opaque = true;
        }
    }

    fn expressions(&mut self, expressions: &[Expr<'a>]) {
        for expression in expressions {
            self.expression(expression);
        }
    }

    fn expression(&mut self, expression: &Expr<'a>) {
        match expression {
            Expr::Var(variable) => {
                self.reads.insert(variable.id);
                // Handed on as a whole it could be asked for anything.
                self.opaque |= self.in_loop && variable.id == "loop";
            }
            Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expression(&slice.expr);
                for part in [&slice.start, &slice.stop, &slice.step] {
                    self.expressions(part.as_slice());
                }
            }
            Expr::UnaryOp(operation) => self.expression(&operation.expr),
            Expr::BinOp(operation) => {
                self.expression(&operation.left);
                self.expression(&operation.right);
            }
            Expr::Compare(compare) => {
                self.expression(&compare.expr);
                for operand in &compare.ops {
                    self.expression(&operand.expr);
                }
            }
            Expr::IfExpr(choice) => {
                self.expression(&choice.test_expr);
                self.expression(&choice.true_expr);
                self.expressions(choice.false_expr.as_slice());
            }
            Expr::Filter(filter) => {
                self.expressions(filter.expr.as_slice());
                self.arguments(&filter.args);
            }
            Expr::Test(test) => {
                self.expression(&test.expr);
                self.arguments(&test.args);
            }
            Expr::GetAttr(attribute) => {
                if let Expr::Var(variable) = &attribute.expr
                    && self.in_loop
                    && variable.id == "loop"
                    && LOOP_FIELDS.contains(&attribute.name)
                {
                    self.loops.push(variable.span());
                } else {
                    self.expression(&attribute.expr);
                }
            }
            Expr::GetItem(item) => {
                self.expression(&item.expr);
                self.expression(&item.subscript_expr);
            }
            Expr::Call(call) => self.call(call),
            Expr::List(list) => self.expressions(&list.items),
            Expr::Tuple(tuple) => self.expressions(&tuple.items),
            Expr::Map(map) => {
                self.expressions(&map.keys);
                self.expressions(&map.values);
            }
        }
    }

    fn call(&mut self, call: &Call<'a>) {
        if let Expr::Var(function) = &call.expr {
            self.calls.insert(function.id);
        } else if let Expr::GetAttr(method) = &call.expr {
            // Methods of texts, mappings and lists change nothing.
            self.expression(&method.expr);
        } else {
            self.opaque = true;
        }
        self.arguments(&call.args);
    }

    fn arguments(&mut self, arguments: &[CallArg<'a>]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(value)
                | CallArg::Kwarg(_, value)
                | CallArg::PosSplat(value)
                | CallArg::KwargSplat(value) => self.expression(value),
            }
        }
    }
}

/// The variables that an assignment sets.
fn assigned<'a>(target: &Expr<'a>, names: &mut BTreeSet<&'a str>) {
    if let Expr::Var(variable) = target {
        names.insert(variable.id);
    } else if let Expr::List(list) = target {
        list.items.iter().for_each(|item| assigned(item, names));
    } else if let Expr::Tuple(tuple) = target {
        tuple.items.iter().for_each(|item| assigned(item, names));
    }
}

fn is_variable(expression: &Expr<'_>, named: impl Fn(&str) -> bool) -> bool {
    matches!(expression, Expr::Var(variable) if named(variable.id))
}

/// Changes to a source, by the places that the parser tells.
struct Edits<'s> {
    source: &'s str,
    edits: Vec<(std::ops::Range<usize>, String)>,
}

impl Edits<'_> {
    fn insert(&mut self, at: u32, text: String) {
        self.edits.push((at as usize..at as usize, text));
    }

    fn replace(&mut self, span: Span, text: String) {
        self.edits
            .push((span.start_offset as usize..span.end_offset as usize, text));
    }

    /// Where the tag ends that this expression is the last of, and how it trims what follows.
    fn tag_end(&self, last: Span) -> Option<(u32, &'static str)> {
        let rest = self.source.get(last.end_offset as usize..)?;
        let tag = rest.trim_start();
        let sign = match tag.as_bytes().first()? {
            b'-' => "-",
            b'+' => "+",
            _ => "",
        };
        let behind = tag[sign.len()..].strip_prefix("%}")?;
        Some((u32::try_from(self.source.len() - behind.len()).ok()?, sign))
    }

    /// `name[start:]` becomes a call.
    fn slice(&mut self, slice: &ConversationSlice) -> Option<()> {
        let name = self
            .source
            .get(slice.name.start_offset as usize..slice.name.end_offset as usize)?;
        let whole = self
            .source
            .get(slice.whole.start_offset as usize..slice.whole.end_offset as usize)?;
        if !whole.starts_with(name) || !whole.ends_with(']') {
            return None;
        }
        self.replace(
            slice.whole,
            format!("{TRACE}.from({name}, {})", slice.start),
        );
        Some(())
    }

    /// The changed source. `None` where changes overlap.
    fn apply(mut self) -> Option<String> {
        // Of those at one place, what was asked for first stands outside.
        self.edits
            .sort_by_key(|(range, _)| (range.start, range.end));
        let mut text = String::with_capacity(self.source.len() + 1024);
        let mut done = 0;
        for (range, new) in &self.edits {
            text.push_str(self.source.get(done..range.start)?);
            text.push_str(new);
            done = range.end;
        }
        text.push_str(self.source.get(done..)?);
        Some(text)
    }
}
