//! naive PID: a straightforward sampler: per thread its stat and its comm as strings, by tid in a map.
//! For each line on stdin it takes a snapshot and prints the CPU time it took, ns.

use std::collections::HashMap;
use std::fs::{read_dir, read_to_string};
use std::io::{stdin, stdout, BufRead, Write};

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

extern "C" {
    fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
}

fn cpu_ns() -> i64 {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    unsafe { clock_gettime(2, &mut now) };
    now.seconds * 1_000_000_000 + now.nanoseconds
}

fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 2..].split_whitespace().collect();
    Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
}

fn snapshot(pid: &str) -> (u64, usize, HashMap<u32, (String, u64)>) {
    let process = ticks(&read_to_string(format!("/proc/{pid}/stat")).unwrap()).unwrap();
    let memory = read_to_string(format!("/proc/{pid}/statm")).unwrap().len();
    let mut threads = HashMap::new();
    for entry in read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let Ok(tid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(stat) = read_to_string(format!("/proc/{pid}/task/{tid}/stat")) else { continue };
        let name = read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        if let Some(time) = ticks(&stat) {
            threads.insert(tid, (name.trim().to_string(), time));
        }
    }
    (process, memory, threads)
}

fn main() {
    let pid = std::env::args().nth(1).expect("naive PID");
    for _ in stdin().lock().lines() {
        let begin = cpu_ns();
        let taken = snapshot(&pid);
        let took = cpu_ns() - begin;
        std::hint::black_box(&taken);
        println!("{took}");
        stdout().flush().unwrap();
    }
}
