//! The `nft` program of this machine, with the libraries that it loads: the agent keeps its second lock
//! with it, and an image has no package manager to get it from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::layer::{File, Privilege};
use crate::command::printed;
use crate::workspace::Workspace;

/// Where it is in the image.
const PATH: &str = "usr/sbin/nft";

pub(crate) fn files(workspace: &Workspace) -> anyhow::Result<Vec<File>> {
    let program = workspace
        .which("nft")
        .context("nft is not on this machine: install the package nftables")?;
    let listed = printed(Command::new("ldd").arg(&program))
        .with_context(|| format!("list the libraries of {} with ldd", program.display()))?;
    let libraries = libraries(&listed)?;
    let mut files = vec![read(PATH.to_owned(), &program)?];
    for library in libraries {
        // The loader looks for the name that ldd says, at the place that ldd says.
        let path = library.to_string_lossy();
        files.push(read(path.trim_start_matches('/').to_owned(), &library)?);
    }
    Ok(files)
}

fn read(path: String, from: &Path) -> anyhow::Result<File> {
    // Follows links: what the image has is the file.
    let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    Ok(File::program(path, bytes, Privilege::None))
}

/// The files in the output of ldd. Those that the kernel provides have none.
fn libraries(listed: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for line in listed.lines().map(str::trim) {
        if line.ends_with("=> not found") {
            bail!("nft lacks a library: {line}");
        }
        let file = line.split_once(" => ").map_or(line, |(_, file)| file);
        let file = file.split(" (").next().unwrap_or_default();
        if file.starts_with('/') {
            files.push(PathBuf::from(file));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_says_with_the_loader() {
        let listed = "\tlinux-vdso.so.1 (0x00007f)\n\
                      \tlibmnl.so.0 => /lib/x/libmnl.so.0 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(listed).unwrap(), expected.map(PathBuf::from));
        assert_eq!(
            libraries("\tstatically linked\n").unwrap(),
            Vec::<PathBuf>::new()
        );
        libraries("\tlibmnl.so.0 => not found\n").unwrap_err();
    }
}
